"""Evaluator: scores candidates on prompts that were prefilled once. A reader prefills, an evaluator scores.

reader      cases of one set ---> prompts: KV by layer, what ranks it, and the tail that is read after it
evaluator   prompts ------------> blocks, on the devices or in the processes that score
            candidates, blocks -> scores
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from kvjax.search.evaluators.scores import Scores
from kvjax.search.samples import RankedCase

BLOCK = 8  # cases that are prefilled and placed at a time: bounds the temporaries


@runtime_checkable
class Prompts(Protocol):
    """Prefilled prompts, for the evaluator that belongs to their reader."""

    @property
    def entropy(self) -> Any:
        """Of each layer's attention to each prompt, in nats: [S L]."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Prefills prompts with one model."""

    def read(self, cases: Sequence[RankedCase], length: int | None = None, tail: int | None = None) -> Any:
        """`Prompts` of the cases, padded to `length` tokens with tails of `tail`; the longest where not given."""
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Scores candidates of one kind. Its blocks stay valid until it is closed."""

    def place(self, prompts: Any) -> list[Any]:
        """Prompts, in one block or several, where candidates are evaluated. Each is a `Prompts`."""
        ...

    def evaluate(self, candidates: Int[np.ndarray, "P L *n"], blocks: list[Any], samples: int) -> Scores:
        """Scores of every candidate on the first `samples` samples of the blocks."""
        ...

    def close(self) -> None:
        """Frees what the evaluator holds beyond this process."""
        ...


def read_blocks(reader: Reader, evaluator: Evaluator, cases: Sequence[RankedCase], length: int, tail: int) -> list[Any]:
    """A set of cases as blocks, read and placed `BLOCK` at a time."""
    parts = (cases[first : first + BLOCK] for first in range(0, len(cases), BLOCK))
    return [block for part in parts for block in evaluator.place(reader.read(part, length, tail))]


def in_blocks(prompts: Any, count: int, size: int) -> list[Any]:
    """A tree of arrays whose first axis is `count` samples, in parts of `size`; copies of the last fill up its part."""
    rows = np.minimum(np.arange(-(-count // size) * size), count - 1)
    padded = jax.tree.map(lambda x: x[rows], prompts)
    return [jax.tree.map(lambda x, at=at: x[at : at + size], padded) for at in range(0, count, size)]


def mean_entropy(blocks: list[Prompts]) -> Float[np.ndarray, "L"]:
    """The mean over samples of each layer's entropy."""
    return np.concatenate([np.asarray(block.entropy) for block in blocks]).mean(axis=0)
