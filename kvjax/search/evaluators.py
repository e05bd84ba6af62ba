"""Where candidates meet samples: cases are read once, then any number of candidates is evaluated on them."""

import abc
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.evaluation import BLOCK
from kvjax.search.reading import Reader, Readings
from kvjax.search.samples import RankedCase
from kvjax.search.scores import Scores
from kvjax.search.space import Candidate


class Evaluators(abc.ABC):
    """Judges candidates of one kind. What `read` returns is for its `evaluate` only."""

    @property
    @abc.abstractmethod
    def full(self) -> Candidate:
        """The candidate that leaves nothing out."""

    @abc.abstractmethod
    def read(self, cases: Sequence[RankedCase]) -> Any:
        """Cases as this arena evaluates them."""

    @abc.abstractmethod
    def evaluate(self, candidates: Int[np.ndarray, "P N"], read: Any, samples: int) -> Scores:
        """Scores of candidates on the first `samples` samples of what was read."""

    @abc.abstractmethod
    def entropy(self, read: Any) -> Float[np.ndarray, "L"]:
        """Of each layer's attention to the prompts, in nats; one for every layer of the model."""


@runtime_checkable
class Population(Protocol):
    """What `TokenEvaluators` needs of an evaluator: the local one, or one that has others evaluate."""

    layers: list[int]

    def place(self, readings: Readings) -> list[Any]: ...

    def __call__(self, candidates: np.ndarray, blocks: list[Any], samples: int) -> Scores: ...


class TokenEvaluators(Evaluators):
    """For candidates of tokens kept, one number a layer or one a kv head.

    Args:
        longest, tail: tokens to which prompts and tails are padded.
        heads: numbers a layer.
    """

    def __init__(self, reader: Reader, evaluator: Population, longest: int, tail: int, heads: int) -> None:
        self._reader, self._evaluator = reader, evaluator
        self._longest, self._tail, self._heads = longest, tail, heads

    @property
    def full(self) -> Candidate:
        return (self._longest,) * (len(self._evaluator.layers) * self._heads)

    def read(self, cases: Sequence[RankedCase]) -> list[Any]:
        read = (
            self._reader.read(cases[first : first + BLOCK], self._longest, self._tail)
            for first in range(0, len(cases), BLOCK)
        )
        return [block for readings in read for block in self._evaluator.place(readings)]

    def evaluate(self, candidates: Int[np.ndarray, "P N"], read: list[Any], samples: int) -> Scores:
        split = candidates if self._heads == 1 else candidates.reshape(len(candidates), -1, self._heads)
        return self._evaluator(split, read, samples)

    def entropy(self, read: list[Any]) -> Float[np.ndarray, "L"]:
        return np.concatenate([np.asarray(block.entropy) for block in read]).mean(axis=0)
