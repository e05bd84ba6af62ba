"""The plan of an evaluation: samples of every task at every length, and of files at the model's context."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from kvjax.eval.arguments import ArgumentError, Arguments
from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.metrics import METRICS
from kvjax.eval.runner import Case
from kvjax.eval.tasks import Task

LENGTHS = (512,)
SAMPLES = 20


@dataclass(frozen=True)
class PlannedCell:
    """`samples` samples of a task at a length in tokens; for a file the length is an upper bound."""

    task: Task
    length: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """All cells, and their cases index by index: an interrupted run has samples of each."""

    cells: tuple[PlannedCell, ...]

    @classmethod
    def of(cls, given: Arguments, tasks: Sequence[Task], context: int | None) -> "Plan":
        """The plan for a model that takes `context` tokens, None if unknown.

        Raises:
            ArgumentError: a length is more than the context, or the context is unknown and files need it.
        """
        if given.data and not given.lengths and context is None:
            raise ArgumentError("the server does not report its context length: give --max-model-len")
        for length in given.lengths:
            if context is not None and length > context:
                raise ArgumentError(f"--lengths {length} is more than the model's context of {context} tokens")
        cells = [
            PlannedCell(task, length, given.samples or SAMPLES) for task in tasks for length in given.lengths or LENGTHS
        ]
        for data in given.data:
            count = min(given.samples or len(data.samples), len(data.samples))
            cells += [PlannedCell(data, length, count) for length in given.lengths or (context or 0,)]
        return cls(tuple(cells))

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Names and lengths of the cells."""
        return [(cell.task.name, cell.length) for cell in self.cells]

    @property
    def cases(self) -> list[Case]:
        rounds = range(max(cell.samples for cell in self.cells))
        return [Case(cell.task, cell.length, index) for index in rounds for cell in self.cells if index < cell.samples]

    def __str__(self) -> str:
        """The number of samples a cell, for a heading."""
        counts = sorted({cell.samples for cell in self.cells})
        return f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} samples a cell"


def fingerprint(data: DataSet) -> str:
    """Twelve hexadecimal digits that change with any sample of a data set."""
    return hashlib.sha256(repr(data.samples).encode()).hexdigest()[:12]


def with_metrics(given: Arguments) -> tuple[tuple[Task, ...], list[str]]:
    """The tasks that the installed packages can score, and a sentence about each other one.

    Raises:
        ArgumentError: one of the others was requested by name.
    """
    tasks, left_out = [], []
    for task in (*given.tasks, *given.data):
        try:
            METRICS[task.metric]("1", ("1",))
        except ImportError as error:
            if task in given.data or not given.all_by_default:
                raise ArgumentError(f"{task.name}: {error}") from error
            left_out.append(f"{task.name} is left out: {error}")
        else:
            tasks += [task] if task in given.tasks else []
    return tuple(tasks), left_out
