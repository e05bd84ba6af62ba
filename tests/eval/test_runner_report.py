"""Summaries of records, and their report on a terminal."""

import io

import pytest
from rich.console import Console

from kvjax.eval.metrics import mean_interval
from kvjax.eval.record import Record, Turn
from kvjax.eval.report import ProgressReport, duration, error_lines, pace_lines, table
from kvjax.eval.summary import Summary

CELLS = [("a", 256), ("a", 512), ("b", 256), ("b", 512)]


def turn(first: float = 0.5, seconds: float = 1.5, tokens: int = 11) -> Turn:
    return Turn("?", ("1",), "1", 1.0, "stop", 9, tokens, first, seconds)


def records(task: str, length: int, scores: list[float | None]) -> list[Record]:
    return [
        Record(task, length, index, score, None if score is not None else f"error {index % 2}", (turn(),))
        for index, score in enumerate(scores)
    ]


SOME = [
    *records("a", 256, [1.0, 1.0, 0.0, 1.0]),
    *records("a", 512, [1.0, None, 0.0, None]),
    *records("b", 256, [0.25, 0.75]),
    *records("b", 512, [None]),
]
SUMMARY = Summary.of(SOME, CELLS, 16)


def printed(*shown: object) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(*shown, sep="\n")
    return out.getvalue()


def test_failed_samples_are_counted_and_not_in_any_mean():
    cells = {(cell.task, cell.length): cell for cell in SUMMARY.cells}
    assert [cells[key].mean for key in CELLS] == [0.75, 0.5, 0.5, None]
    assert [(cells[key].scored, cells[key].failed) for key in CELLS] == [(4, 0), (2, 2), (2, 0), (0, 1)]
    assert (SUMMARY.scored, SUMMARY.failed, SUMMARY.missing) == (8, 3, 5)


def test_intervals_are_those_of_the_scores():
    first = SUMMARY.cells[0]
    assert (first.mean, first.low, first.high) == mean_interval([1.0, 1.0, 0.0, 1.0])


def test_means_are_of_cells_that_have_one():
    assert SUMMARY.mean(length=256) == pytest.approx(0.625)
    assert SUMMARY.mean(task="b") == 0.5
    assert SUMMARY.mean() == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert Summary.of([], CELLS, 4).mean() is None


def test_a_record_that_was_not_asked_for_is_an_error():
    with pytest.raises(KeyError):
        Summary.of(records("c", 256, [1.0]), CELLS, 1)


def test_pace_is_the_median_request():
    turns = [turn(first, first + 1.0, tokens) for first, tokens in ((0.1, 11), (0.3, 21), (9.0, 1))]
    summary = Summary.of([Record("a", 256, 0, 1.0, None, tuple(turns))], [("a", 256)], 1)
    assert (summary.paces[0].first_token_seconds, summary.paces[0].tokens_per_second) == (0.3, 15.0)


def test_answers_of_one_token_have_no_rate():
    summary = Summary.of([Record("a", 256, 0, 1.0, None, (turn(tokens=1),))], [("a", 256)], 1)
    assert summary.paces[0].tokens_per_second is None
    assert "tokens/s" not in printed(*pace_lines(summary))


def test_the_table_has_every_cell_and_every_mean():
    lines = [line.split() for line in printed(table(SUMMARY)).splitlines() if line.strip()]
    low, high = (round(100 * end) for end in mean_interval([1.0, 1.0, 0.0, 1.0])[1:])
    rows = {line[0]: line[1:] for line in lines}
    assert rows["a"][:2] == ["75.0", f"{low}-{high}"]
    assert rows["a"][2] == "50.0"
    assert rows["a"][-3:] == ["2", "failed", "62.5"]
    assert rows["b"][-4:] == ["-", "1", "failed", "50.0"]
    assert rows["mean"] == ["of", "tasks", "62.5", "50.0", "58.3"]


def test_errors_are_told_with_their_number():
    text = printed(*error_lines(SUMMARY))
    assert "3 samples failed and have no score" in text
    assert "2 x  error 1" in text
    assert "1 x  error 0" in text
    assert "5 samples were not evaluated" in text
    assert not error_lines(Summary.of(records("a", 256, [1.0]), [("a", 256)], 1))


def test_the_most_frequent_errors_stand_for_the_others():
    many = [Record("a", 256, index, None, f"error {index}", ()) for index in range(9)]
    assert "and 4 other errors" in printed(*error_lines(Summary.of(many, [("a", 256)], 9)))


def test_brackets_of_an_error_are_no_markup():
    odd = Summary.of([Record("a", 256, 0, None, "max_tokens [bold]3[/bold] in [0, 2]", ())], [("a", 256)], 1)
    assert "max_tokens [bold]3[/bold] in [0, 2]" in printed(*error_lines(odd))


def test_a_log_gets_a_line_for_every_tenth():
    out = io.StringIO()
    earlier, new = records("a", 256, [1.0] * 20), records("a", 512, [0.0, None] * 20)
    with ProgressReport(Console(file=out, width=120), earlier, 60) as progress:
        for record in new:
            progress.add(record)
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("24/60 samples, mean 90.9, 2 failed, ")
    assert lines[-1].startswith("60/60 samples, mean 50.0, 20 failed, 0 s left")


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    with ProgressReport(Console(file=out, width=120, force_terminal=True), [], 2) as progress:
        for record in records("a", 256, [1.0, None]):
            progress.add(record)
        progress._bar.refresh()
    assert "2/2" in out.getvalue()
    assert "1 failed" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (9e3, "2.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
