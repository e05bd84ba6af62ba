"""The tasks to look at: all of them with a question each, or one sample of one."""

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvjax.eval.tasks import Task
from kvjax.eval.tasks_sample import Sample

CHARACTERS_PER_TOKEN = 4  # of English, near enough to show a sample without a tokenizer
SHORTEST, LONGEST = 128, 1 << 20
SHOWN = 600  # characters at either end of a context


def catalogue(tasks: Iterable[Task]) -> Table:
    """All tasks, a line each."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("task", no_wrap=True)
    shown.add_column("score", no_wrap=True)
    shown.add_column("turns", justify="right", no_wrap=True)
    shown.add_column("asks, for instance", overflow="ellipsis", no_wrap=True, ratio=1)
    for task in tasks:
        sample = example(task)
        turns = Text(str(len(sample.turns)), style="dim" if len(sample.turns) == 1 else "")
        asked = " ".join((sample.question.strip().splitlines() or [sample.answer_prefix])[-1].split())
        shown.add_row(task.name, Text(task.metric, style="dim"), turns, Text(asked))
    return shown


def specimen(task: Task) -> Group:
    """A short sample of one task: what the model reads, what it is asked, which answers count."""
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
