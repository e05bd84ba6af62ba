"""Generations: candidates evaluated together, and the loop of asking, evaluating, and telling."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.allocators.allocator import Allocator, Problem, State
from kvjax.search.evaluators.scores import Scores
from kvjax.search.objective import Objective

Evaluate = Callable[[Int[np.ndarray, "P L"]], Scores]


@dataclasses.dataclass(frozen=True, eq=False)
class SearchGeneration:
    """Candidates that were evaluated together on the search set.

    Attributes:
        score, log_probability: means over the samples.
        fitness: the values that the allocator was told.
        spread: CMA-ES's sigma before; NaN for others.
        seconds: that evaluating took.
    """

    candidates: Int[np.ndarray, "P L"]
    score: Float[np.ndarray, "P"]
    log_probability: Float[np.ndarray, "P"]
    fitness: Float[np.ndarray, "P"]
    spread: float
    seconds: float


class AllocatorRun:
    """One allocator on one problem. Iterating evaluates the next generation; it may be left at any time.

    Attributes:
        state: of the allocator; with `history` all that has to be saved to go on.
        history: every generation so far.
    """

    def __init__(
        self, allocator: Allocator, problem: Problem, objective: Objective, evaluate: Evaluate, seed: int
    ) -> None:
        self.allocator, self.problem, self.objective = allocator, problem, objective
        self._evaluate = evaluate
        self.state: State = allocator.begin(problem, seed)
        self.history: list[SearchGeneration] = []

    def __iter__(self) -> Iterator[SearchGeneration]:
        while True:
            spread = self.allocator.spread(self.state)
            candidates, state = self.allocator.ask(self.problem, self.state)
            if not len(candidates):
                return
            began = time.perf_counter()
            scores = self._evaluate(candidates)
            fitness = self.objective(candidates, scores, self.allocator.group(self.problem, state))
            generation = SearchGeneration(
                candidates,
                self.objective.score(scores).mean(axis=1, dtype=np.float64),
                scores.log_probability.mean(axis=1, dtype=np.float64),
                fitness,
                spread,
                time.perf_counter() - began,
            )
            self.state = self.allocator.tell(self.problem, state, candidates, fitness)
            self.history.append(generation)
            yield generation

    def replay(self, history: Sequence[SearchGeneration]) -> None:
        """Takes the allocator to where it stood after `history`, without evaluating anything again.

        Raises:
            ValueError: it would have asked for other candidates, so `history` is of another search.
        """
        for number, generation in enumerate(history):
            candidates, state = self.allocator.ask(self.problem, self.state)
            if not np.array_equal(candidates, generation.candidates):
                raise ValueError(
                    f"generation {number} is of another search: go on with the same seed, budget, allocator and "
                    "samples, and with no fewer evaluations"
                )
            self.state = self.allocator.tell(self.problem, state, candidates, generation.fitness)
            self.history.append(generation)

    @property
    def evaluations(self) -> int:
        """Candidates evaluated so far."""
        return sum(len(generation.candidates) for generation in self.history)

    def finalists(self, most: int) -> Int[np.ndarray, "P L"]:
        """The best distinct candidates by fitness, after the allocator's own proposals; each made to cost the total."""
        space = self.problem.space
        candidates = np.concatenate([generation.candidates for generation in self.history])
        fitness = np.concatenate([generation.fitness for generation in self.history])
        ordered = [
            *self.allocator.proposals(self.problem, self.state),
            *candidates[np.argsort(-fitness, kind="stable")],
        ]
        distinct: dict[tuple[int, ...], None] = {}
        for candidate in ordered:
            distinct.setdefault(space.settled(candidate))
            if len(distinct) == most:
                break
        return np.array(list(distinct), np.int64)
