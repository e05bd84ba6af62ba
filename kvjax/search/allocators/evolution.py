"""EvolKV's allocator: CMA-ES over the layers' budgets, group after group (arXiv 2509.08315, section 3).

`project` searches the logarithms of shares, and every candidate is brought to the exact total before it is evaluated.
`paper` searches k/c itself; the total is then a matter of the objective and of the completion at the end.
"""

import dataclasses
import math
from functools import cache
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from evosax.algorithms import CMA_ES
from jaxtyping import Array, Float, Int

from kvjax.search.allocators.allocator import Allocator, Problem, State

LEAST_SHARE = 0.02  # of the mean, where a search of logarithms may begin
Mode = Literal["project", "paper"]


@dataclasses.dataclass(frozen=True)
class Evolution(Allocator):
    """CMA-ES as evosax has it, with ties told apart by order.

    Attributes:
        evaluations: candidates evaluated for each group of layers.
        sigma: of the first generation; None is the paper's 0.3, of k/c, and 0.5 for logarithms that begin at uniform.
        population: candidates a generation; None is the paper's 4 + floor(3 ln n).
        start: where each layer's search begins, as a share of the mean, the floor not counted; None is 1.
    """

    name: ClassVar[str] = "evolution"
    mode: Mode = "project"
    evaluations: int = 400
    sigma: float | None = None
    population: int | None = None
    start: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.evaluations < 1 or (self.sigma or 1) <= 0 or (self.population or 4) < 4:
            raise ValueError(
                f"evaluations={self.evaluations} must be positive, as must sigma={self.sigma}, and a population of "
                f"{self.population} at least 4"
            )

    def begin(self, problem: Problem, seed: int) -> State:
        state: State = {
            "key": jax.random.key_data(jax.random.key(seed)),
            "best": self._first(problem),
            "fitness": np.float64(-np.inf),
        }
        return self._enter(problem, state, 0)

    def ask(self, problem: Problem, state: State) -> tuple[Int[np.ndarray, "P L"], State]:
        group = self.group(problem, state)
        if state["evaluated"] >= self.evaluations:
            if int(state["group"]) + 1 == len(problem.space.groups):
                return np.zeros((0, problem.space.units), np.int64), state
            state = self._enter(problem, state, int(state["group"]) + 1)
            group = self.group(problem, state)
        es = _strategy(self._size(len(group)), len(group))
        key, drawing = jax.random.split(jax.random.wrap_key_data(jnp.asarray(state["key"])))
        batch, inner = es.ask(drawing, state["es"], self._params(es))
        points = np.tile(state["best"], (len(batch), 1))
        points[:, group.start : group.stop] = batch
        state = state | {"key": jax.random.key_data(key), "es": inner, "batch": np.asarray(batch), "points": points}
        return np.array([self._candidate(problem, point) for point in points]), state

    def tell(
        self, problem: Problem, state: State, candidates: Int[np.ndarray, "P L"], fitness: Float[np.ndarray, "P"]
    ) -> State:
        group = self.group(problem, state)
        es = _strategy(self._size(len(group)), len(group))
        inner = state["es"]
        # where all are equal there is nothing to learn, least of all that steps should be smaller
        if np.ptp(fitness) > 0:
            key = jax.random.wrap_key_data(jnp.asarray(state["key"]))
            # how far behind the best, for float32 would make ties of large numbers that differ by little
            behind = jnp.asarray(np.max(fitness) - fitness, jnp.float32)
            inner, _ = es.tell(key, state["batch"], behind, inner, self._params(es))
        state = state | {"es": inner, "evaluated": state["evaluated"] + len(candidates)}
        winner = int(np.argmax(fitness))
        if fitness[winner] > state["fitness"]:
            state = state | {"best": state["points"][winner], "fitness": np.float64(fitness[winner])}
        return state

    def proposals(self, problem: Problem, state: State) -> Int[np.ndarray, "P L"]:
        """The mean, which a noisy objective has not chosen for its luck, and where the search began."""
        group, point = self.group(problem, state), np.array(state["best"])
        point[group.start : group.stop] = state["es"].mean
        return np.array([self._candidate(problem, point), self._candidate(problem, self._first(problem))])

    def group(self, problem: Problem, state: State) -> range:
        return problem.space.groups[int(state["group"])]

    def spread(self, state: State) -> float:
        return float(state["es"].std)

    def _first(self, problem: Problem) -> Float[np.ndarray, "L"]:
        """The point at which the search begins."""
        dims = problem.space.dims
        if self.start is None:
            return np.full(dims, 0.0 if self.mode == "project" else 1.0, np.float32)
        if len(self.start) != dims or min(self.start) < 0:
            raise ValueError(f"start={self.start}: give {dims} shares, none negative")
        point = np.asarray(self.start, np.float32)
        return np.log(np.maximum(point, LEAST_SHARE)) if self.mode == "project" else point

    def _enter(self, problem: Problem, state: State, group: int) -> State:
        """Begins a group with a fresh strategy; the groups before it stay at their best."""
        layers = problem.space.groups[group]
        es = _strategy(self._size(len(layers)), len(layers))
        key, initial = jax.random.split(jax.random.wrap_key_data(jnp.asarray(state["key"])))
        inner = es.init(initial, jnp.asarray(state["best"][layers.start : layers.stop]), self._params(es))
        return state | {
            "key": jax.random.key_data(key),
            "group": np.int64(group),
            "evaluated": np.int64(0),
            "es": inner,
            "batch": np.zeros((self._size(len(layers)), len(layers)), np.float32),
            "points": np.zeros((self._size(len(layers)), problem.space.dims), np.float32),
        }

    def _candidate(self, problem: Problem, point: Float[np.ndarray, "L"]) -> tuple[int, ...]:
        if self.mode == "project":
            return problem.space.decode(point)
        space = problem.tokens
        rounded = np.rint(np.nan_to_num(point) * space.mean)
        return tuple(int(k) for k in np.clip(rounded, space.floor, space.ceiling))

    def _size(self, dims: int) -> int:
        return self.population or 4 + math.floor(3 * math.log(dims))

    def _params(self, es: Any) -> Any:
        wide = self.mode == "project" and self.start is None
        return es.default_params.replace(std_init=self.sigma or (0.5 if wide else 0.3))


@cache
def _strategy(population: int, dims: int) -> CMA_ES:
    return CMA_ES(population_size=population, solution=jnp.zeros(dims), fitness_shaping_fn=strict_ranks)


def strict_ranks(population: Array, fitness: Float[Array, "P"], state: Any, params: Any) -> Float[Array, "P"]:
    """CMA-ES's weights by rank, equal fitness by order of drawing, which is as good as chance.

    evosax gives ties the weight of their mean rank: a flat generation then moves nothing, which CMA-ES takes for steps
    that are too long, and sigma falls from 0.3 to 1e-6 within 60 generations.
    """
    del population, state
    order = jnp.argsort(jnp.where(jnp.isnan(fitness), jnp.inf, fitness), stable=True)
    return jnp.zeros_like(params.weights).at[order].set(params.weights)
