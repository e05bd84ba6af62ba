"""Where schemes meet samples: cases are read once, then any number of schemes is judged on them."""

import abc
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.evaluation import BLOCK
from kvjax.search.reading import Reader, Readings
from kvjax.search.samples import Case
from kvjax.search.scores import Scores
from kvjax.search.space import Scheme


class Arena(abc.ABC):
    """Judges schemes of one kind. What `read` returns is for its `judge` only."""

    @property
    @abc.abstractmethod
    def full(self) -> Scheme:
        """The scheme that leaves nothing out."""

    @abc.abstractmethod
    def read(self, cases: Sequence[Case]) -> Any:
        """Cases as this arena judges them."""

    @abc.abstractmethod
    def judge(self, schemes: Int[np.ndarray, "P N"], read: Any, samples: int) -> Scores:
        """Scores of schemes on the first `samples` samples of what was read."""

    @abc.abstractmethod
    def entropy(self, read: Any) -> Float[np.ndarray, "L"]:
        """Of each layer's attention to the prompts, in nats; one for every layer of the model."""


@runtime_checkable
class Population(Protocol):
    """What `TokenArena` needs of an evaluator: the local one, or one that has others judge."""

    layers: list[int]

    def place(self, readings: Readings) -> list[Any]: ...

    def __call__(self, schemes: np.ndarray, blocks: list[Any], samples: int) -> Scores: ...


class TokenArena(Arena):
    """For schemes of tokens kept, one number a layer or one a kv head.

    Args:
        longest, tail: tokens to which prompts and tails are padded.
        heads: numbers a layer.
    """

    def __init__(self, reader: Reader, evaluator: Population, longest: int, tail: int, heads: int) -> None:
        self._reader, self._evaluator = reader, evaluator
        self._longest, self._tail, self._heads = longest, tail, heads

    @property
    def full(self) -> Scheme:
        return (self._longest,) * (len(self._evaluator.layers) * self._heads)

    def read(self, cases: Sequence[Case]) -> list[Any]:
        read = (
            self._reader.read(cases[first : first + BLOCK], self._longest, self._tail)
            for first in range(0, len(cases), BLOCK)
        )
        return [block for readings in read for block in self._evaluator.place(readings)]

    def judge(self, schemes: Int[np.ndarray, "P N"], read: list[Any], samples: int) -> Scores:
        split = schemes if self._heads == 1 else schemes.reshape(len(schemes), -1, self._heads)
        return self._evaluator(split, read, samples)

    def entropy(self, read: list[Any]) -> Float[np.ndarray, "L"]:
        return np.concatenate([np.asarray(block.entropy) for block in read]).mean(axis=0)
