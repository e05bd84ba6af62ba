"""Token spaces: how many tokens each layer, or each kv head, keeps: whole numbers in bounds, with one sum."""

import dataclasses
import math
from fractions import Fraction
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax.budget import LayerBudget
from kvjax.budget.split import largest_remainder
from kvjax.search.spaces.space import Candidate, EvictionSettings, SearchSpace, grouped


@dataclasses.dataclass(frozen=True)
class TokenSpace(SearchSpace):
    """Tokens kept of a prompt, one number a layer, `layers * mean` in all (EvolKV, arXiv 2509.08315, section 3).

    Attributes:
        layers: that have a budget: all but those with a sliding window.
        mean: tokens a layer keeps on average (the paper's c).
        floor: tokens that every layer keeps: the window and the sinks.
        ceiling: tokens that no layer exceeds: the longest prompt.
        group_layers: layers whose numbers are searched together; 8 in the paper, one group after another.
        heads: numbers a layer: 1, or one for each of its kv heads, layer after layer.

    Raises:
        ValueError: no layer, or floor, mean and ceiling out of order.
    """

    shares_tokens: ClassVar[bool] = True
    layers: int
    mean: int
    floor: int
    ceiling: int
    group_layers: int = 8
    heads: int = 1

    def __post_init__(self) -> None:
        if min(self.layers, self.group_layers, self.heads) < 1:
            raise ValueError(
                f"layers={self.layers}, group_layers={self.group_layers} and heads={self.heads} must be at least 1"
            )
        if not 0 <= self.floor <= self.mean <= self.ceiling:
            raise ValueError(
                f"a mean of {self.mean} tokens must be from the floor of {self.floor}, which every layer keeps anyway, "
                f"to the ceiling of {self.ceiling}: change the budget, or the window"
            )

    @classmethod
    def of(
        cls, *, layers: int, kv_heads: int, longest: int, mean: int, group_layers: int, eviction: EvictionSettings
    ) -> "TokenSpace":
        del kv_heads
        return cls(layers, mean, eviction.floor, longest, group_layers)

    @property
    def units(self) -> int:
        return self.layers * self.heads

    @property
    def dims(self) -> int:
        """One coordinate for each number: the logarithm of its share."""
        return self.units

    @property
    def total(self) -> int:
        """Tokens over all numbers of a candidate."""
        return self.units * self.mean

    @property
    def groups(self) -> tuple[range, ...]:
        return grouped(self.units, self.group_layers * self.heads)

    @property
    def uniform(self) -> Candidate:
        return (self.mean,) * self.units

    @property
    def full(self) -> Candidate:
        return (self.ceiling,) * self.units

    def decode(self, point: Float[np.ndarray, "L"]) -> Candidate:
        return self.project(np.exp(np.clip(point.astype(np.float64), -20, 20)))

    def settled(self, candidate: Int[np.ndarray, "L"]) -> Candidate:
        if candidate.sum() != self.total:
            return self.completed(candidate)
        return tuple(int(retained) for retained in candidate)

    def tokens(self, candidate: Candidate) -> tuple[int, ...]:
        return tuple(int(mean) for mean in np.rint(np.reshape(candidate, (self.layers, -1)).mean(axis=1)))

    def cost(self, candidate: Candidate) -> float:
        return float(np.mean(candidate))

    def affordable(self, candidates: Int[np.ndarray, "P N"]) -> Bool[np.ndarray, "P"]:
        return candidates.sum(axis=1) <= self.mean * candidates.shape[1]

    def budgets(self, candidate: Candidate, eviction: EvictionSettings) -> list[LayerBudget]:
        return [
            LayerBudget.selecting(
                max(row) + eviction.headroom,
                observation_window=eviction.window,
                pooling_kernel=eviction.kernel,
                sinks=eviction.sinks,
                head_tokens=tuple(row) if len(row) > 1 else None,
            )
            for row in np.reshape(candidate, (self.layers, -1)).tolist()
        ]

    def project(self, weights: Float[np.ndarray, "L"]) -> Candidate:
        """The candidate that shares what lies beyond the floors in proportion to weights: exactly the total.

        Water-filling: what a layer cannot take above its ceiling goes to the others, in the same proportions. Then
        largest remainder makes whole numbers. Where all weights are 0 they count as equal.

        Raises:
            ValueError: a weight is negative, infinite or not a number.
        """
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"weights {weights}: give finite numbers, none negative")
        capacity, left = Fraction(self.ceiling - self.floor), Fraction(self.total - self.units * self.floor)
        shares = [Fraction(0)] * self.units
        open_layers = list(range(self.units))
        while open_layers and left > 0:
            exact = [Fraction(float(weights[layer])) for layer in open_layers]
            if not any(exact):
                exact = [Fraction(1)] * len(open_layers)
            level = left / sum(exact)
            filled = [layer for layer, weight in zip(open_layers, exact, strict=True) if weight * level >= capacity]
            if not filled:
                for layer, weight in zip(open_layers, exact, strict=True):
                    shares[layer] = weight * level
                break
            for layer in filled:
                shares[layer], left = capacity, left - capacity
            open_layers = [layer for layer in open_layers if layer not in filled]
        return tuple(self.floor + share for share in largest_remainder(shares))

    def completed(self, candidate: Float[np.ndarray, "L"] | Int[np.ndarray, "L"]) -> Candidate:
        """Any numbers scaled to the exact total: what a search without a hard constraint has found, or at another c.

        The paper rounds up, and overshoots; here the sum is exact. "Search once, expand": a candidate found at one mean
        keeps the proportions of what lies beyond the floors.
        """
        return self.project(np.maximum(np.asarray(candidate, np.float64) - self.floor, 0.0))

    def check(self, candidates: Int[np.ndarray, "P L"]) -> None:
        """Raises where a candidate leaves the space.

        Raises:
            ValueError: another number of layers, a number out of bounds, or another sum.
        """
        if candidates.ndim != 2 or candidates.shape[1] != self.units:
            raise ValueError(f"candidates of shape {candidates.shape} for {self.units} numbers: one row each")
        if candidates.min() < self.floor or candidates.max() > self.ceiling:
            raise ValueError(f"a candidate leaves [{self.floor}, {self.ceiling}]: {candidates}")
        if (sums := candidates.sum(axis=1) - self.total).any():
            raise ValueError(f"candidates differ from the total of {self.total} tokens by {sums}")


@dataclasses.dataclass(frozen=True)
class HeadSpace(TokenSpace):
    """Tokens kept of a prompt by each kv head of each layer."""

    @classmethod
    def of(
        cls, *, layers: int, kv_heads: int, longest: int, mean: int, group_layers: int, eviction: EvictionSettings
    ) -> "HeadSpace":
        return cls(layers, mean, eviction.floor, longest, group_layers, kv_heads)


def cache_score(candidate: Candidate, mean: int | float) -> float:
    """The paper's CacheScore: 1 at its target mean c, falling five times as fast above it as below.

    `max(0, 1 - (k - c)/c)` for a mean k above c, else `1 - 0.2 (1 - k/c)`.
    """
    retained = math.fsum(candidate) / len(candidate)
    if retained > mean:
        return max(0.0, 1 - (retained - mean) / mean)
    return 1 - 0.2 * (1 - retained / mean)
