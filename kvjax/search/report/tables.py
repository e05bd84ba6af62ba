"""Tables of search results for the terminal, and the rows that the notebook's view shares with them."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from kvjax.search.outcome import Outcome, SetScore
from kvjax.search.report.formatting import label, measured, setting
from kvjax.search.result import SearchResult

HEAD = ("", "search", "select", "test", "", "over uniform", "gap", "evaluated")
LEGEND = "gap: score on the search set less that on the test set; evaluated: candidates"


def outcomes(result: SearchResult) -> Table:
    """The table of one search: its outcomes on the three sets, the chosen one in bold.

    It fits 80 columns.
    """
    caption = f"{measured(result)}, x100: {setting(result)}\n{LEGEND}"
    rendered = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", padding=0, pad_edge=False)
    for head in HEAD:
        rendered.add_column(head, justify="right" if head else "left", no_wrap=True)
    for outcome in result.outcomes:
        chosen = outcome.name == result.chosen.name
        rendered.add_row(*texts(outcome), style="bold" if chosen else "dim" if outcome.candidate is None else "")
    return rendered


def table(results: Sequence[SearchResult]) -> Table:
    """The table of searches by allocators: test scores x100, the best of each row in green.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("no results: give those of one search at least")
    rendered = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    rendered.add_column("test score x100\n[dim]and its 95% interval[/dim]", no_wrap=True)
    names = list(dict.fromkeys(outcome.name for result in results for outcome in result.outcomes))
    for name in names:
        rendered.add_column(name.replace("-", "-\n"), justify="right", no_wrap=True)
    for result in results:
        cells = {outcome.name: outcome for outcome in result.outcomes}
        best = max((o.test.mean for o in result.outcomes if o.candidate is not None), default=None)
        row = [Text(label(result))]
        for name in names:
            outcome, text = cells.get(name), Text()
            if outcome is not None:
                first = outcome.candidate is not None and outcome.test.mean == best
                text.append(points(outcome.test), style="bold green" if first else "")
                text.append(f"\n{_whole(outcome.test)}", style="dim")
            row.append(text)
        rendered.add_row(*row)
    return rendered


def texts(outcome: Outcome) -> tuple[str, ...]:
    """A row under `HEAD`; the ends of intervals are whole points, which is all that they are sure to.

    Only candidates have a gain over uniform budgets, for the full cache costs more.
    """
    mean, low, high = (100 * value + 0.0 for value in outcome.gain)
    return (
        outcome.name,
        points(outcome.search),
        points(outcome.selection),
        points(outcome.test),
        _whole(outcome.test),
        ""
        if outcome.name == "uniform" or outcome.candidate is None
        else f"{mean:+.1f} ({round(low)} to {round(high)})",
        f"{100 * outcome.calibration_gap + 0.0:+.1f}",
        "" if outcome.candidate is None else f"{outcome.evaluations:,}",
    )


def points(score: SetScore) -> str:
    return f"{100 * score.mean:.1f}"


def _whole(score: SetScore) -> str:
    return f"{100 * score.low:.0f}-{100 * score.high:.0f}"
