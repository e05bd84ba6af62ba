"""What was judged together, and the loop that has it judged."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.allocator import Allocator, Problem, State
from kvjax.search.objective import Objective
from kvjax.search.scores import Scores

Judge = Callable[[Int[np.ndarray, "P L"]], Scores]


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """Schemes that were judged together on the search set.

    Attributes:
        score, log_probability: means over the samples.
        fitness: what the allocator was told.
        spread: CMA-ES's sigma when it asked; NaN for others.
        seconds: that judging took.
    """

    schemes: Int[np.ndarray, "P L"]
    score: Float[np.ndarray, "P"]
    log_probability: Float[np.ndarray, "P"]
    fitness: Float[np.ndarray, "P"]
    spread: float
    seconds: float


class AllocatorRun:
    """One allocator at work on one problem. Iterating judges the next generation; it may be left at any time.

    Attributes:
        state: of the allocator; with `history` all that has to be saved to go on.
        history: every generation so far.
    """

    def __init__(self, allocator: Allocator, problem: Problem, objective: Objective, judge: Judge, seed: int) -> None:
        self.allocator, self.problem, self.objective = allocator, problem, objective
        self._judge = judge
        self.state: State = allocator.begin(problem, seed)
        self.history: list[Generation] = []

    def __iter__(self) -> Iterator[Generation]:
        while True:
            spread = self.allocator.spread(self.state)
            schemes, state = self.allocator.ask(self.problem, self.state)
            if not len(schemes):
                return
            began = time.perf_counter()
            scores = self._judge(schemes)
            fitness = self.objective(schemes, scores, self.allocator.group(self.problem, state))
            generation = Generation(
                schemes,
                self.objective.score(scores).mean(axis=1, dtype=np.float64),
                scores.log_probability.mean(axis=1, dtype=np.float64),
                fitness,
                spread,
                time.perf_counter() - began,
            )
            self.state = self.allocator.tell(self.problem, state, schemes, fitness)
            self.history.append(generation)
            yield generation

    def replay(self, history: Sequence[Generation]) -> None:
        """Takes the allocator to where it stood after `history`, without judging anything again.

        Raises:
            ValueError: it would have asked for other schemes, so `history` is of another search.
        """
        for number, generation in enumerate(history):
            schemes, state = self.allocator.ask(self.problem, self.state)
            if not np.array_equal(schemes, generation.schemes):
                raise ValueError(
                    f"generation {number} is of another search: go on with the same seed, budget, allocator and "
                    "samples, and with no fewer evaluations"
                )
            self.state = self.allocator.tell(self.problem, state, schemes, generation.fitness)
            self.history.append(generation)

    @property
    def evaluations(self) -> int:
        """Schemes judged so far."""
        return sum(len(generation.schemes) for generation in self.history)

    def finalists(self, most: int) -> Int[np.ndarray, "P L"]:
        """The best distinct schemes by fitness, after the allocator's own proposals; each made to cost the total."""
        space = self.problem.space
        schemes = np.concatenate([generation.schemes for generation in self.history])
        fitness = np.concatenate([generation.fitness for generation in self.history])
        ordered = [*self.allocator.proposals(self.problem, self.state), *schemes[np.argsort(-fitness, kind="stable")]]
        found: dict[tuple[int, ...], None] = {}
        for scheme in ordered:
            found.setdefault(space.settled(scheme))
            if len(found) == most:
                break
        return np.array(list(found), np.int64)
