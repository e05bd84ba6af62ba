"""The generated tasks by name.

`ruler/...` are RULER's tasks in RULER's words, `text/...` the shapes of other benchmarks in plain English, and
`mini/...` the same in short words for small models, whose figures are comparable with nobody else's.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from kvjax.eval.tasks_answering import answering_tasks
from kvjax.eval.tasks_chain import chain_tasks
from kvjax.eval.tasks_code import code_tasks
from kvjax.eval.tasks_counting import counting_tasks
from kvjax.eval.tasks_needle import needle_tasks
from kvjax.eval.tasks_sample import CountTokens, Sample
from kvjax.eval.tasks_surface import MINI, RULER
from kvjax.eval.tasks_turns import turns_tasks
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
    yield from (*counting_tasks(), *answering_tasks(), *turns_tasks(), *chain_tasks(), *code_tasks())


TASKS: dict[str, Task] = {task.name: task for task in _tasks()}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        KeyError: there is none; the message lists all names.
    """
    if name not in TASKS:
        raise KeyError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
