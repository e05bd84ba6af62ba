"""What is searched: how many tokens each layer keeps, whole numbers between a floor and a ceiling with one sum."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
from jaxtyping import Float, Int

from kvjax.budget.split import largest_remainder

Candidate = tuple[int, ...]  # KV entries kept of a prompt, one number a layer that does not slide


@dataclasses.dataclass(frozen=True)
class Space:
    """Candidates of equal cost: one number a layer, `layers * mean` in all (EvolKV, arXiv 2509.08315, section 3).

    Attributes:
        layers: that have a budget: all but those with a sliding window.
        mean: tokens a layer keeps on average (the paper's c).
        floor: tokens that every layer keeps: the window and the sinks, which nobody chooses.
        ceiling: tokens that no layer exceeds: the longest prompt.
        group_layers: layers whose numbers are searched together; 8 in the paper, one group after another.
        heads: numbers a layer: 1, or one for each of its kv heads, layer after layer.

    Raises:
        ValueError: no layer, or floor, mean and ceiling out of order.
    """

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

    @property
    def units(self) -> int:
        """Numbers of a candidate."""
        return self.layers * self.heads

    @property
    def dims(self) -> int:
        """Coordinates of a point that a search moves: here one for each number."""
        return self.units

    @property
    def total(self) -> int:
        """Tokens over all numbers of a candidate."""
        return self.units * self.mean

    @property
    def groups(self) -> tuple[range, ...]:
        """The coordinates that are searched together, from the bottom up."""
        return grouped(self.units, self.group_layers * self.heads)

    @property
    def uniform(self) -> Candidate:
        return (self.mean,) * self.units

    def decode(self, point: Float[np.ndarray, "L"]) -> Candidate:
        """The candidate at a point, which holds logarithms of shares."""
        return self.project(np.exp(np.clip(point.astype(np.float64), -20, 20)))

    def settled(self, candidate: Int[np.ndarray, "L"]) -> Candidate:
        """A candidate as it will be used: of exactly the total."""
        return (
            tuple(int(retained) for retained in candidate)
            if candidate.sum() == self.total
            else self.completed(candidate)
        )

    def project(self, weights: Float[np.ndarray, "L"]) -> Candidate:
        """The candidate that shares what lies beyond the floors in proportion to weights: exactly the total.

        Water-filling: what a layer cannot take above its ceiling goes to the others, in the same proportions. Then
        largest remainder makes whole numbers. Where all weights are 0 they count as equal.

        Raises:
            ValueError: a weight is negative, infinite or not a number.
        """
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"weights {weights}: give finite numbers, none negative")
        room, left = Fraction(self.ceiling - self.floor), Fraction(self.total - self.units * self.floor)
        shares = [Fraction(0)] * self.units
        open_layers = list(range(self.units))
        while open_layers and left > 0:
            exact = [Fraction(float(weights[layer])) for layer in open_layers]
            if not any(exact):
                exact = [Fraction(1)] * len(open_layers)
            level = left / sum(exact)
            filled = [layer for layer, weight in zip(open_layers, exact, strict=True) if weight * level >= room]
            if not filled:
                for layer, weight in zip(open_layers, exact, strict=True):
                    shares[layer] = weight * level
                break
            for layer in filled:
                shares[layer], left = room, left - room
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


def grouped(count: int, most: int) -> tuple[range, ...]:
    """`count` places in runs of at most `most`."""
    return tuple(range(first, min(first + most, count)) for first in range(0, count, most))


def cache_score(candidate: Candidate, mean: int | float) -> float:
    """The paper's CacheScore: 1 at its target mean c, falling five times as fast above it as below.

    `max(0, 1 - (k - c)/c)` for a mean k above c, else `1 - 0.2 (1 - k/c)`.
    """
    retained = math.fsum(candidate) / len(candidate)
    if retained > mean:
        return max(0.0, 1 - (retained - mean) / mean)
    return 1 - 0.2 * (1 - retained / mean)
