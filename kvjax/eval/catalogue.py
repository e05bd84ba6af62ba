"""The tasks to look at: all of them with a question each, or one sample of one."""

from collections.abc import Iterable

from rich.console import Group
from rich.text import Text

from kvjax.eval.datasets import DataSet
from kvjax.eval.tasks import Sample, Task

CHARACTERS_PER_TOKEN = 4  # of English, near enough to show a sample without a tokenizer
SHORTEST, LONGEST = 128, 1 << 20
SHOWN = 600  # characters at either end of a context


def catalogue(tasks: Iterable[Task]) -> Group:
    """All tasks, a line each: name, metric, number of turns, and a question; a terminal cuts the end."""
    rows = [("task", "score", "turns", "a question")]
    for task in tasks:
        sample = example(task)
        question = (sample.question.strip().splitlines() or [sample.answer_prefix])[-1]
        rows.append((task.name, task.metric, str(len(sample.turns)), " ".join(question.split())))
    names, metrics = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = []
    for index, (name, metric, turns, question) in enumerate(rows):
        line = Text(f"{name:<{names}}  ", no_wrap=True, overflow="ellipsis", style="" if index else "bold")
        lines.append(line.append(f"{metric:<{metrics}}  ", style="dim").append(f"{turns:>5}  {question}"))
    return Group(*lines)


def specimen(task: Task) -> Group:
    """A short sample of one task: its context, its questions, the accepted answers."""
    sample = example(task)
    context = sample.context.rstrip("\n")
    if len(context) > 2 * SHOWN:
        left_out = f"\n[... {len(context) - 2 * SHOWN:,} characters ...]\n"
        shown = Text(context[:SHOWN]).append(left_out, style="dim").append(context[-SHOWN:])
    else:
        shown = Text(context)
    parts = [Text(f"{task.name}, scored by {task.metric}", style="bold"), Text(""), shown]
    for turn in sample.turns:
        parts += [
            Text(""),
            Text(turn.question.rstrip("\n"), style="cyan"),
            Text(turn.answer_prefix, style="cyan").append(turn.reply, style="green"),
            Text(f"right if it has: {' | '.join(turn.answers)}", style="dim"),
        ]
    return Group(*parts)


def several_turns(task: Task) -> bool:
    """Whether a task has samples of several turns."""
    return any(sample.later for sample in (task.samples if isinstance(task, DataSet) else (example(task),)))


def example(task: Task) -> Sample:
    """A sample of the least power of two of tokens that holds the task.

    Raises:
        ValueError: none does.
    """
    length = SHORTEST
    while True:
        try:
            return task.sample(length=length, seed=0, count=lambda text: len(text) // CHARACTERS_PER_TOKEN)
        except ValueError:
            if length >= LONGEST:
                raise
            length *= 2
