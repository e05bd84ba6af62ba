"""Search space: the candidates that a search may choose among, all of equal cost, and what their numbers mean.

A candidate is a row of whole numbers, the same count for every layer with a budget, layer after layer.
"""

import abc
import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax.budget import LayerBudget

Candidate = tuple[int, ...]  # the numbers of all layers with a budget, layer after layer


@dataclasses.dataclass(frozen=True)
class EvictionSettings:
    """Settings of stage 1 that all candidates share.

    Attributes:
        window: last tokens of a prompt, whose queries choose what stays and which stay themselves.
        kernel: width of max-pooling.
        sinks: first tokens of a prompt, which stay too.
        headroom: entries that a served view keeps free for generated tokens.
    """

    window: int
    kernel: int
    sinks: int
    headroom: int

    @property
    def floor(self) -> int:
        """Tokens that every layer keeps, whatever its budget."""
        return self.window + self.sinks


class SearchSpace(abc.ABC):
    """Candidates of one kind and one cost. Implementations are frozen dataclasses; what is searched is data.

    Attributes:
        shares_tokens: numbers are tokens kept and have one sum, so that they can be shared out by weights, scaled to
            another token budget, and compared with rules that do so.
        layers: layers with a budget.
        mean: token budget, an average over layers.
    """

    shares_tokens: ClassVar[bool]
    layers: int
    mean: int

    @classmethod
    @abc.abstractmethod
    def of(
        cls, *, layers: int, kv_heads: int, longest: int, mean: int, group_layers: int, eviction: EvictionSettings
    ) -> "SearchSpace":
        """The space for a model and its samples.

        Args:
            longest: tokens of the longest prompt.
            group_layers: layers whose numbers are searched together.

        Raises:
            ValueError: the token budget leaves nothing to choose.
        """

    @property
    @abc.abstractmethod
    def units(self) -> int:
        """Numbers of a candidate."""

    @property
    @abc.abstractmethod
    def dims(self) -> int:
        """Coordinates of a point that a search moves."""

    @property
    @abc.abstractmethod
    def groups(self) -> tuple[range, ...]:
        """Coordinates that are searched together, from the bottom up."""

    @property
    @abc.abstractmethod
    def uniform(self) -> Candidate:
        """The candidate whose layers are all alike."""

    @property
    @abc.abstractmethod
    def full(self) -> Candidate:
        """The full cache: keeps and reads everything, at a cost outside the space."""

    @abc.abstractmethod
    def decode(self, point: Float[np.ndarray, "L"]) -> Candidate:
        """The candidate at a point."""

    @abc.abstractmethod
    def settled(self, candidate: Int[np.ndarray, "L"]) -> Candidate:
        """A candidate as it will be used: of exactly the space's cost."""

    @abc.abstractmethod
    def tokens(self, candidate: Candidate) -> tuple[int, ...]:
        """Tokens that each layer keeps of a prompt; where its heads differ, their mean."""

    @abc.abstractmethod
    def cost(self, candidate: Candidate) -> float:
        """Tokens a layer on average, in the unit of `mean`."""

    @abc.abstractmethod
    def affordable(self, candidates: Int[np.ndarray, "P N"]) -> Bool[np.ndarray, "P"]:
        """Whether each candidate costs no more than `mean`."""

    @abc.abstractmethod
    def budgets(self, candidate: Candidate, eviction: EvictionSettings) -> list[LayerBudget]:
        """The budget of each layer, with headroom for generated tokens."""

    def by_layer(self, candidates: Int[np.ndarray, "P N"]) -> Int[np.ndarray, "P L n"]:
        """Candidates with the numbers of a layer in a row of their own."""
        return candidates.reshape(len(candidates), self.layers, -1)


def grouped(count: int, most: int) -> tuple[range, ...]:
    """`count` places in runs of at most `most`."""
    return tuple(range(first, min(first + most, count)) for first in range(0, count, most))
