"""Greedy marginal utility: each layer's loss alone by size, then the best sizes of one total."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.allocators.allocator import Allocator, Problem, State
from kvjax.search.spaces import Candidate


@dataclasses.dataclass(frozen=True)
class Greedy(Allocator):
    """Marginal utility: the loss of each layer alone at each size, then the best sizes of one total.

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
    """Greedy that measures as many sizes as the others evaluate candidates: its gain at an equal cost."""

    name: ClassVar[str] = "fine-greedy"
