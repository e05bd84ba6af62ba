"""Summaries of records: a mean and its interval for every task and length."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvjax.eval.metrics import mean_interval
from kvjax.eval.record import Record


@dataclass(frozen=True)
class Cell:
    """The samples of one task at one length.

    Attributes:
        scored, failed: numbers of samples with a score and with an error; the latter are not in the mean.
        mean, low, high: of the scores with its 95% interval, in [0, 1]; None if nothing was scored.
    """

    task: str
    length: int
    scored: int
    failed: int
    mean: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, task: str, length: int, records: Sequence[Record]) -> "Cell":
        """Sums up the records of one cell."""
        scores = [record.score for record in records if record.score is not None]
        mean, low, high = mean_interval(scores) if scores else (None, None, None)
        return cls(task, length, len(scores), len(records) - len(scores), mean, low, high)


@dataclass(frozen=True)
class Pace:
    """Medians over all turns of one length.

    Attributes:
        first_token_seconds: from the request to the first text.
        tokens_per_second: of one request, from its first token to its last; None if all answers are one token.
    """

    length: int
    first_token_seconds: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Summary:
    """All cells, by task and then by length, in the order of the plan.

    Attributes:
        planned: samples of the whole evaluation; more than scored and failed if it was interrupted.
        errors: each error and the number of samples with it, the most frequent first.
    """

    cells: tuple[Cell, ...]
    paces: tuple[Pace, ...]
    planned: int
    errors: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, records: Iterable[Record], cells: Sequence[tuple[str, int]], planned: int) -> "Summary":
        """Sums up records; `cells` are the tasks and lengths to show, whether they have records or not."""
        by_cell: dict[tuple[str, int], list[Record]] = {cell: [] for cell in cells}
        for record in records:
            by_cell[record.task, record.length].append(record)
        everything = [record for group in by_cell.values() for record in group]
        errors = Counter(record.error for record in everything if record.error is not None)
        paces = (_pace(length, everything) for length in dict.fromkeys(length for _, length in cells))
        return cls(
            tuple(Cell.of(*cell, group) for cell, group in by_cell.items()),
            tuple(pace for pace in paces if pace is not None),
            planned,
            tuple(errors.most_common()),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def scored(self) -> int:
        return sum(cell.scored for cell in self.cells)

    @property
    def failed(self) -> int:
        return sum(cell.failed for cell in self.cells)

    @property
    def missing(self) -> int:
        """Samples that were not evaluated."""
        return self.planned - self.scored - self.failed

    def mean(self, *, task: str | None = None, length: int | None = None) -> float | None:
        """The mean of the cells' means, of one task or one length if given; None if there is none."""
        means = [
            cell.mean
            for cell in self.cells
            if cell.mean is not None and task in (None, cell.task) and length in (None, cell.length)
        ]
        return statistics.fmean(means) if means else None

    def to_json(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Everything as JSON; scores in [0, 1]."""
        return {
            "settings": dict(settings),
            "mean": self.mean(),
            "scored": self.scored,
            "failed": self.failed,
            "missing": self.missing,
            "lengths": [{"length": length, "mean": self.mean(length=length)} for length in self.lengths],
            "cells": [asdict(cell) for cell in self.cells],
            "pace": [asdict(pace) for pace in self.paces],
            "errors": [{"error": error, "samples": count} for error, count in self.errors],
        }


def _pace(length: int, records: Sequence[Record]) -> Pace | None:
    turns = [turn for record in records if record.length == length for turn in record.turns]
    if not turns:
        return None
    rates = [
        (turn.tokens - 1) / (turn.seconds - turn.first_token_seconds)
        for turn in turns
        if turn.tokens > 1 and turn.seconds > turn.first_token_seconds
    ]
    first = statistics.median(turn.first_token_seconds for turn in turns)
    return Pace(length, round(first, 4), round(statistics.median(rates), 1) if rates else None)
