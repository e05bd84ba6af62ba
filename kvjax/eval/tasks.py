"""The generated tasks by name: `ruler/...` in RULER's words, `mini/...` in short ones for small models."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from kvjax.eval.tasks_needle import needle_tasks
from kvjax.eval.tasks_sample import CountTokens, Sample
from kvjax.eval.tasks_surface import MINI, RULER
from kvjax.eval.tasks_variables import VariableTask


@runtime_checkable
class Task(Protocol):
    """Makes test cases of any length. A task is frozen: nothing a caller does changes what it generates."""

    @property
    def name(self) -> str:
        """The key in `TASKS`: `surface/task`."""
        ...

    @property
    def metric(self) -> str:
        """How replies are scored: a key of `kvjax.eval.metrics.METRICS`."""
        ...

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case that takes at most `length` tokens with all its questions and replies, and nearly that.

        The same name, length, seed and tokenizer give the same sample on any machine.

        Raises:
            ValueError: `length` is too short for the task; the message says so.
        """
        ...


def _tasks() -> Iterator[Task]:
    for surface in (RULER, MINI):
        yield from needle_tasks(surface)
        yield VariableTask(f"{surface.name}/vt", surface)


TASKS: dict[str, Task] = {task.name: task for task in _tasks()}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        KeyError: there is none; the message lists all names.
    """
    if name not in TASKS:
        raise KeyError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
