"""Random search: candidates drawn around uniform budgets."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from kvjax.search.allocators.allocator import Allocator, Problem, State


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
