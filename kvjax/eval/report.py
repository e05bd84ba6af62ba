"""The report of an evaluation on a terminal: progress, and the table at its end."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvjax.eval.record import Record
from kvjax.eval.summary import Cell, Summary
from kvjax.eval.targets import Target

PARTS = 10  # a log, unlike a terminal, gets so many lines
SHOWN_ERRORS = 5


class ProgressReport:
    """The progress of an evaluation: a bar on a terminal, a line now and then in a log."""

    def __init__(self, console: Console, done: Sequence[Record], total: int) -> None:
        """`done`: records of an earlier run; `total`: of all, these included."""
        self._console, self._total, self._earlier = console, total, len(done)
        self._records = list(done)
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[score]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("samples", total=total, completed=len(done), score=self._score())

    def add(self, record: Record) -> None:
        """Shows that another sample is done."""
        self._records.append(record)
        done = len(self._records)
        self._bar.update(self._task, completed=done, score=self._score())
        new, all_new = done - self._earlier, self._total - self._earlier
        if not self._console.is_terminal and new * PARTS // all_new > (new - 1) * PARTS // all_new:
            seconds = (time.monotonic() - self._began) / new * (all_new - new)
            score = Text.from_markup(self._score()).plain
            self._console.print(f"{done}/{self._total} samples, {score}, {duration(seconds)} left", highlight=False)

    def _score(self) -> str:
        scores = [record.score for record in self._records if record.score is not None]
        failed = len(self._records) - len(scores)
        mean = f"mean {100 * sum(scores) / len(scores):.1f}" if scores else "mean -"
        return mean + (f", [red]{failed} failed[/red]" if failed else "")

    def __enter__(self) -> "ProgressReport":
        if len(self._records) < self._total:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """'12 s', '3 min' or '2.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def table(summary: Summary) -> Table:
    """Tasks by lengths: each cell the mean x100, and the bounds of its 95% interval."""
    lengths = summary.lengths
    shown = Table(box=box.SIMPLE_HEAD, show_footer=True)
    shown.add_column("score x100 [dim](95% interval)[/dim]", "mean of tasks", no_wrap=True)
    for length in lengths:
        shown.add_column(f"{length:,}", _mean(summary.mean(length=length)), justify="right", no_wrap=True)
        shown.add_column("")
    several = len(lengths) > 1
    if several:
        shown.add_column("mean", _mean(summary.mean()), justify="right", no_wrap=True)
    cells = {(cell.task, cell.length): cell for cell in summary.cells}
    for task in summary.tasks:
        row = [text for length in lengths for text in _cell(cells.get((task, length)))]
        shown.add_row(task, *row, *([_mean(summary.mean(task=task))] if several else []))
    return shown


def cache_lines(target: Target, lengths: Sequence[int]) -> list[Text]:
    """Bytes that the cache retains of a prompt and reads a step, a line a length; no lines for a full cache."""
    lines, head = [], "compressed cache"
    width = max((len(f"{length:,}") for length in lengths), default=0)
    for length in lengths:
        if (footprint := target.footprint(length)) is None:
            continue
        retained, read, full = footprint.retained, footprint.read, footprint.full
        line = f"  {head:16}  {length:>{width},}  {binary(retained)} kept of {binary(full)} ({retained / full:.0%}), "
        lines.append(Text(f"{line}{binary(read)} read a step ({read / full:.0%})", style="dim"))
        head = ""
    return lines


def binary(size: int) -> str:
    """'12 KiB' or '3.4 MiB'."""
    return f"{size / 1024:,.0f} KiB" if size < 1 << 20 else f"{size / (1 << 20):,.1f} MiB"


def pace_lines(summary: Summary) -> list[Text]:
    """Latency and throughput of the median request, a line a length."""
    width = max((len(f"{pace.length:,}") for pace in summary.paces), default=0)
    lines, head = [], "median request"
    for pace in summary.paces:
        line = f"  {head:16}  {pace.length:>{width},}  first token after {pace.first_token_seconds:.2f} s"
        line += f", then {pace.tokens_per_second:,.0f} tokens/s" if pace.tokens_per_second else ""
        lines.append(Text(line, style="dim"))
        head = ""
    return lines


def error_lines(summary: Summary) -> list[Text]:
    """Failures with their reasons, the most frequent first."""
    lines = []
    if summary.failed:
        lines.append(Text(f"{summary.failed} samples failed and have no score:", style="red"))
        lines += [Text(f"{count:>6} x  {error}") for error, count in summary.errors[:SHOWN_ERRORS]]
        hidden = len(summary.errors) - SHOWN_ERRORS
        lines += [Text(f"          and {hidden} other errors", style="dim")] if hidden > 0 else []
    if summary.missing:
        lines.append(Text(f"{summary.missing} samples were not evaluated", style="yellow"))
    return lines


def _cell(cell: Cell | None) -> tuple[Text, Text]:
    """The mean and its interval, with the number of failures."""
    if cell is None:
        return Text(""), Text("")
    note = Text("")
    if cell.low is not None and cell.high is not None:
        note.append(f"{100 * cell.low:3.0f}-{100 * cell.high:.0f}", style="dim")
    if cell.failed:
        note.append(f" {cell.failed} failed", style="red")
    return _mean(cell.mean), note


def _mean(mean: float | None) -> Text:
    if mean is None:
        return Text("").append("-", style="dim")
    # appended, so that the colour is that of the number alone
    return Text("").append(f"{100 * mean:.1f}", style="green" if mean >= 0.9 else "yellow" if mean >= 0.5 else "red")
