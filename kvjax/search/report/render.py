"""The view of a search result in a notebook, as HTML: budgets as bars, outcomes as a table, gains with intervals."""

from html import escape

import numpy as np

from kvjax.search.outcome import Outcome
from kvjax.search.report.formatting import cell, gained, measured, setting
from kvjax.search.report.tables import HEAD, LEGEND, points, texts
from kvjax.search.result import SearchResult

HEIGHT = 96  # pixels of the longest bar
BROADEST = 20  # layers that have room for their numbers
CELL = "padding:2px 8px;text-align:right;white-space:nowrap"


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
    floor = result.config.eviction.floor
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
    """A sentence on the gain over uniform budgets, with its interval."""
    if result.chosen.name == "uniform":
        return "Nothing did better than uniform budgets on the selection set, so these are the result."
    mean, interval = gained(result.chosen.gain)
    low, high = result.chosen.gain[1:]
    sure = "" if low > 0 or high < 0 else ", which may be chance"
    return f"Points over uniform budgets of the same cost: {mean} ({interval}){sure}."


def gap(outcome: Outcome) -> str:
    """A sentence on the gap between the search set and the test set."""
    difference = 100 * outcome.calibration_gap
    if difference < 0.05:
        return f"The search set does not flatter it: {points(outcome.search)} there."
    score = points(outcome.search)
    return f"The search set, by which it was found, flatters it by {difference:.1f} points: {score} there."


def _row(outcome: Outcome, *, bold: bool) -> str:
    name, *numbers = texts(outcome)
    weight = "font-weight:bold" if bold else "font-weight:normal"
    cells = "".join(f'<td style="{CELL}">{escape(number)}</td>' for number in numbers)
    return f'<tr style="{weight}"><td style="{CELL};text-align:left">{escape(name)}</td>{cells}</tr>'


def _full(result: SearchResult) -> str:
    for outcome in result.outcomes:
        if outcome.candidate is None:
            return f"; the full cache has {points(outcome.test)}"
    return ""
