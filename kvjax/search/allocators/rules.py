"""Rules: budgets of a fixed shape, which need no evaluating and stand beside every search for comparison."""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.budget.split import pyramid_capacities
from kvjax.search.allocators.allocator import Fixed, Problem
from kvjax.search.spaces import Candidate


@dataclasses.dataclass(frozen=True)
class Uniform(Fixed):
    """Every layer the same, as SnapKV and RocketKV have it."""

    name: ClassVar[str] = "uniform"

    def candidate(self, problem: Problem) -> Candidate:
        return problem.space.uniform


@dataclasses.dataclass(frozen=True)
class Pyramid(Fixed):
    """PyramidKV (arXiv 2406.02069): an arithmetic series that falls from the first layer to the last."""

    name: ClassVar[str] = "pyramid"
    beta: int = 20

    def candidate(self, problem: Problem) -> Candidate:
        space = problem.tokens
        each = pyramid_capacities(space.layers, space.mean, space.floor, space.ceiling, self.beta)
        return tuple(np.repeat(each, space.heads).tolist())


@dataclasses.dataclass(frozen=True)
class InversePyramid(Pyramid):
    """The same series rising."""

    name: ClassVar[str] = "inverse-pyramid"

    def candidate(self, problem: Problem) -> Candidate:
        return super().candidate(problem)[::-1]


@dataclasses.dataclass(frozen=True)
class Entropy(Fixed):
    """Layers share by exp(entropy) of their attention: the number of tokens that they look at, as it were."""

    name: ClassVar[str] = "entropy"

    def candidate(self, problem: Problem) -> Candidate:
        space = problem.tokens
        return space.project(np.repeat(np.exp(problem.entropy - problem.entropy.max()), space.heads))


ANCHORS: tuple[Fixed, ...] = (Uniform(), Pyramid(), InversePyramid(), Entropy())
