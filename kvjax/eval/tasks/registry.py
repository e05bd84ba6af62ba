"""The generated tasks by name.

`ruler/...` are RULER's tasks in RULER's words, `text/...` the shapes of other benchmarks in plain English, and
`mini/...` the same in short words for small models, whose figures are not comparable with published ones.
"""

from collections.abc import Iterator

from kvjax.eval.tasks.answering import answering_tasks
from kvjax.eval.tasks.chain import chain_tasks
from kvjax.eval.tasks.code import code_tasks
from kvjax.eval.tasks.counting import counting_tasks
from kvjax.eval.tasks.needle import needle_tasks
from kvjax.eval.tasks.surface import MINI, RULER
from kvjax.eval.tasks.task import Task
from kvjax.eval.tasks.turns import turns_tasks
from kvjax.eval.tasks.variables import VariableTask


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
