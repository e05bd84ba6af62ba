"""What CMA-ES is measured against, at equal cost: fixed shapes, entropy, random search, greedy marginal utility."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from kvjax.budget.split import pyramid_capacities
from kvjax.search.allocator import Allocator, Fixed, Problem, State
from kvjax.search.space import Candidate


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


@dataclasses.dataclass(frozen=True)
class RandomSearch(Allocator):
    """Shares drawn from a log-normal distribution around uniform ones.

    Attributes:
        evaluations: candidates evaluated.
        sigma: of the logarithms.
    """

    name: ClassVar[str] = "random"
    evaluations: int = 400
    sigma: float = 1.0
    population: int = 10

    def begin(self, problem: Problem, seed: int) -> State:
        return {"seed": np.int64(seed), "evaluated": np.int64(0)}

    def ask(self, problem: Problem, state: State) -> tuple[Int[np.ndarray, "P L"], State]:
        evaluated, space = int(state["evaluated"]), problem.space
        count = min(self.population, self.evaluations - evaluated)
        rng = np.random.default_rng([int(state["seed"]), evaluated])
        points = self.sigma * rng.standard_normal((max(count, 0), space.dims))
        candidates = np.array([space.decode(point) for point in points], np.int64).reshape(-1, space.units)
        return candidates, state | {"evaluated": np.int64(evaluated + len(candidates))}


@dataclasses.dataclass(frozen=True)
class Greedy(Allocator):
    """Marginal utility: what each layer loses alone at each size, then the best sizes of one total.

    A layer's curve is measured while all others keep everything, `sizes` points each; the shares are a knapsack over
    the curves, solved exactly on a grid of `step` tokens. It assumes that the layers' losses add up.
    """

    name: ClassVar[str] = "greedy"
    sizes: int = 6
    step: int = 0

    def begin(self, problem: Problem, seed: int) -> State:
        del seed
        return {"round": np.int64(0), "curves": np.zeros((problem.tokens.units, self.sizes))}

    def grid(self, problem: Problem) -> Int[np.ndarray, "N"]:
        """The sizes at which a layer is measured: from the floor to the ceiling, each a multiple of the one before."""
        space = problem.tokens
        return np.unique(np.rint(np.geomspace(max(space.floor, 1), space.ceiling, self.sizes)).astype(np.int64))

    def ask(self, problem: Problem, state: State) -> tuple[Int[np.ndarray, "P L"], State]:
        space, grid = problem.tokens, self.grid(problem)
        if state["round"] == 0:
            candidates = np.full((space.units * len(grid), space.units), space.ceiling)
            for layer in range(space.units):
                candidates[layer * len(grid) : (layer + 1) * len(grid), layer] = grid
        elif state["round"] == 1:
            candidates = self.proposals(problem, state)
        else:
            candidates = np.zeros((0, space.units), np.int64)
        return candidates, state | {"round": state["round"] + 1}

    def tell(
        self, problem: Problem, state: State, candidates: Int[np.ndarray, "P L"], fitness: Float[np.ndarray, "P"]
    ) -> State:
        if state["round"] != 1:
            return state
        curves, grid = np.zeros((problem.tokens.units, self.sizes)), self.grid(problem)
        curves[:, : len(grid)] = fitness.reshape(problem.tokens.units, len(grid))
        return state | {"curves": curves}

    def proposals(self, problem: Problem, state: State) -> Int[np.ndarray, "P L"]:
        curves = np.asarray(state["curves"])[:, : len(self.grid(problem))]
        return np.array([self._knapsack(problem, curves)])

    def _knapsack(self, problem: Problem, curves: Float[np.ndarray, "L N"]) -> Candidate:
        """The sizes of the largest summed utility, which is linear between the measured points."""
        space, grid = problem.tokens, self.grid(problem)
        step = self.step or max(1, (space.mean - space.floor) // 8)
        units = (space.total - space.units * space.floor) // step
        most = min(units, -(-(space.ceiling - space.floor) // step))
        tokens = np.minimum(space.floor + step * np.arange(most + 1), space.ceiling)
        best = np.full(units + 1, -np.inf)
        best[0] = 0.0
        taken = np.zeros((space.units, units + 1), np.int64)
        for layer in range(space.units):
            utility = np.interp(tokens, grid, np.maximum.accumulate(curves[layer]))
            table = np.full((units + 1, most + 1), -np.inf)
            for take in range(most + 1):
                table[take:, take] = best[: units + 1 - take] + utility[take]
            taken[layer], best = table.argmax(axis=1), table.max(axis=1)
        left, retained = units, np.zeros(space.units)
        for layer in reversed(range(space.units)):
            retained[layer] = taken[layer, left]
            left -= int(retained[layer])
        return space.project(retained)


@dataclasses.dataclass(frozen=True)
class FineGreedy(Greedy):
    """Greedy that measures as many sizes as the others evaluate candidates: what it gains by an equal cost."""

    name: ClassVar[str] = "fine-greedy"


ANCHORS: tuple[Fixed, ...] = (Uniform(), Pyramid(), InversePyramid(), Entropy())
