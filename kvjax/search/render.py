"""A search as a notebook and a terminal show it: what was found, how sure that is, and what it was compared with."""

from collections.abc import Sequence
from html import escape

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from kvjax.search.formatting import cell, gained, label, measured, setting
from kvjax.search.outcome import Outcome, SetScore
from kvjax.search.result import SearchResult

HEIGHT = 96  # pixels of the longest bar
BROADEST = 20  # layers that have room for their numbers
CELL = "padding:2px 8px;text-align:right;white-space:nowrap"
HEAD = ("", "search", "select", "test", "", "over uniform", "gap", "evaluated")
LEGEND = "gap: by how much the search set flatters; evaluated: candidates"


def html(result: SearchResult) -> str:
    """The view of a notebook: no script, no style that leaves it, and the page's own colours, light or dark."""
    chosen = result.chosen
    mean, interval = cell(chosen.test)
    rows = [_row(outcome, bold=outcome.name == chosen.name) for outcome in result.outcomes]
    heads = "".join(f'<th style="{CELL}">{head}</th>' for head in HEAD)
    return (
        '<div style="font-family:sans-serif;line-height:1.5">'
        f"<p><b>{escape(chosen.name)}</b>: {escape(setting(result))} by each of {len(result.tokens)} layers on "
        f"average.<br><b>{mean}%</b> {measured(result)} ({interval}) on {chosen.test.samples} samples kept for this "
        f"test{_full(result)}. {escape(gain(result))}<br>{escape(gap(chosen))}</p>"
        f"{svg(result)}"
        '<table style="border-collapse:collapse;margin-top:8px;color:inherit;font-size:inherit">'
        '<caption style="caption-side:bottom;text-align:left;color:inherit;opacity:0.7">'
        f"{measured(result)}, x100, of {chosen.search.samples} samples to search, {chosen.selection.samples} to select "
        f"and {chosen.test.samples} to test with 95% intervals; {LEGEND}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def svg(result: SearchResult) -> str:
    """A bar a layer, a line at the mean, in the colour of the text around it; hover for the numbers."""
    retained = np.array(result.tokens)
    layers = [index for index, window in enumerate(result.windows) if window is None]
    broad = len(retained) <= BROADEST
    bar, step, every = (26, 32, 1) if broad else (10, 12, 4)
    most, end = max(1, int(retained.max())), step * len(retained)
    floor = result.config.window + result.config.sinks
    lines = {HEIGHT + 16: "layer"} | ({HEIGHT + 31: "tokens"} if broad else {})
    parts = []
    for place, (layer, tokens) in enumerate(zip(layers, retained.tolist(), strict=True)):
        left, tall, foot = step * place, HEIGHT * tokens / most, HEIGHT * min(tokens, floor) / most
        parts.append(
            f"<g><title>layer {layer}: {tokens:,} tokens</title>"
            f'<rect x="{left}" y="{2 + HEIGHT - tall:.1f}" width="{bar}" height="{tall:.1f}" opacity="0.45"/>'
            f'<rect x="{left}" y="{2 + HEIGHT - foot:.1f}" width="{bar}" height="{foot:.1f}" opacity="0.55"/></g>'
        )
        for (height, _), number in zip(lines.items(), (layer, tokens), strict=False):
            if place % every == 0:
                parts.append(f'<text x="{left + bar / 2}" y="{height}" text-anchor="middle">{number}</text>')
    level = 2 + HEIGHT - HEIGHT * float(retained.mean()) / most
    parts.append(f'<path d="M0 {level:.1f}H{end}" stroke="currentColor" stroke-dasharray="5 3"/>')
    parts.append(f'<text x="{end + 4}" y="{level + 4:.1f}">mean {retained.mean():.6g}</text>')
    parts += [f'<text x="{end + 4}" y="{height}">{name}</text>' for height, name in lines.items()]
    return (
        f'<svg role="img" aria-label="Tokens kept of a prompt by each layer" width="{end + 90}" '
        f'height="{HEIGHT + 36}" fill="currentColor" font-size="11" font-family="sans-serif" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def gain(result: SearchResult) -> str:
    """What is gained over uniform budgets, as sure as it is."""
    if result.chosen.name == "uniform":
        return "Nothing did better than uniform budgets on the selection set, so these are the result."
    mean, interval = gained(result.chosen.gain)
    low, high = result.chosen.gain[1:]
    sure = "" if low > 0 or high < 0 else ", which may be chance"
    return f"Points over uniform budgets of the same cost: {mean} ({interval}){sure}."


def gap(outcome: Outcome) -> str:
    """By how much the search set flatters."""
    points = 100 * outcome.calibration_gap
    if points < 0.05:
        return f"The search set does not flatter it: {_points(outcome.search)} there."
    return (
        f"The search set, by which it was found, flatters it by {points:.1f} points: {_points(outcome.search)} there."
    )


def outcomes(result: SearchResult) -> Table:
    """The terminal's table of one search: what was compared, on the three sets, the chosen one in bold.

    It fits 80 columns.
    """
    caption = f"{measured(result)}, x100: {setting(result)}\n{LEGEND}"
    shown = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", padding=0, pad_edge=False)
    for head in HEAD:
        shown.add_column(head, justify="right" if head else "left", no_wrap=True)
    for outcome in result.outcomes:
        chosen = outcome.name == result.chosen.name
        shown.add_row(*_texts(outcome), style="bold" if chosen else "dim" if outcome.candidate is None else "")
    return shown


def table(results: Sequence[SearchResult]) -> Table:
    """The terminal's table of tasks by allocators: test scores x100, the best of each row at its budget in green.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("no results: give those of one search at least")
    shown = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    shown.add_column("test score x100\n[dim]and its 95% interval[/dim]", no_wrap=True)
    names = list(dict.fromkeys(outcome.name for result in results for outcome in result.outcomes))
    for name in names:
        shown.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for result in results:
        found = {outcome.name: outcome for outcome in result.outcomes}
        best = max((o.test.mean for o in result.outcomes if o.candidate is not None), default=None)
        row = [Text(label(result))]
        for name in names:
            outcome, text = found.get(name), Text()
            if outcome is not None:
                first = outcome.candidate is not None and outcome.test.mean == best
                text.append(_points(outcome.test), style="bold green" if first else "")
                text.append(f"\n{_whole(outcome.test)}", style="dim")
            row.append(text)
        shown.add_row(*row)
    return shown


def _texts(outcome: Outcome) -> tuple[str, ...]:
    """A row under `HEAD`; the ends of intervals are whole points, which is all that they are sure to.

    What is gained is said of candidates alone: the full cache costs more than uniform budgets do.
    """
    points, low, high = (100 * value + 0.0 for value in outcome.gain)
    return (
        outcome.name,
        _points(outcome.search),
        _points(outcome.selection),
        _points(outcome.test),
        _whole(outcome.test),
        ""
        if outcome.name == "uniform" or outcome.candidate is None
        else f"{points:+.1f} ({round(low)} to {round(high)})",
        f"{100 * outcome.calibration_gap + 0.0:+.1f}",
        "" if outcome.candidate is None else f"{outcome.evaluations:,}",
    )


def _row(outcome: Outcome, *, bold: bool) -> str:
    name, *numbers = _texts(outcome)
    weight = "font-weight:bold" if bold else "font-weight:normal"
    cells = "".join(f'<td style="{CELL}">{escape(number)}</td>' for number in numbers)
    return f'<tr style="{weight}"><td style="{CELL};text-align:left">{escape(name)}</td>{cells}</tr>'


def _full(result: SearchResult) -> str:
    for outcome in result.outcomes:
        if outcome.candidate is None:
            return f"; the full cache has {_points(outcome.test)}"
    return ""


def _points(score: SetScore) -> str:
    return f"{100 * score.mean:.1f}"


def _whole(score: SetScore) -> str:
    return f"{100 * score.low:.0f}-{100 * score.high:.0f}"
