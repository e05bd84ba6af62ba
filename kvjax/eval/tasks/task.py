"""The interface of a task, and the base class of the generated ones."""

import random
from typing import Protocol, runtime_checkable

from kvjax.eval.tasks.sample import CountTokens, Sample


@runtime_checkable
class Task(Protocol):
    """A source of test cases of any length. A task is frozen: nothing a caller does changes what it generates."""

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


class GeneratedTask:
    """Base of the tasks that are generated, which are frozen dataclasses with a `name` and a `sample` as in `Task`."""

    name: str
    metric: str = "string_match_all"

    def rng(self, length: int, seed: int) -> random.Random:
        """The generator of all random choices of one sample."""
        return random.Random(f"{self.name}/{length}/{seed}")
