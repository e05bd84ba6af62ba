"""The generated tasks by name: `ruler/...` in RULER's words, `mini/...` in short ones for small models."""

from kvjax.eval.tasks_needle import NeedleTask, needle_tasks
from kvjax.eval.tasks_surface import MINI, RULER
from kvjax.eval.tasks_variables import VariableTask

Task = NeedleTask | VariableTask

TASKS: dict[str, Task] = {
    task.name: task
    for surface in (RULER, MINI)
    for task in (*needle_tasks(surface), VariableTask(f"{surface.name}/vt", surface))
}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        KeyError: there is none; the message lists all names.
    """
    if name not in TASKS:
        raise KeyError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]
