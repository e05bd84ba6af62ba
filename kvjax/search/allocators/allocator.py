"""Allocator: a way to find a candidate, by ask and tell, until it asks for none.

CMA-ES and the heuristics it is compared with have this one signature. Their state is a tree of arrays, so any of them
can be stopped between two generations, saved, and resumed to the bit.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.spaces import SearchSpace, TokenSpace

State = dict[str, Any]  # a tree of NumPy or JAX arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The facts besides fitness that an allocator may use.

    Attributes:
        space: of the candidates.
        entropy: of each layer's attention to the prompts, in nats.
    """

    space: SearchSpace
    entropy: Float[np.ndarray, "L"]

    @property
    def tokens(self) -> TokenSpace:
        """The space, for allocators that give each layer a number of tokens.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(self.space, TokenSpace):
            raise ValueError("this allocator shares tokens among layers: RocketKV's numbers take evolution or random")
        return self.space


@dataclasses.dataclass(frozen=True)
class Allocator(abc.ABC):
    """Frozen settings; all that changes is in the state."""

    name: ClassVar[str]

    @abc.abstractmethod
    def begin(self, problem: Problem, seed: int) -> State:
        """The state before the first generation."""

    @abc.abstractmethod
    def ask(self, problem: Problem, state: State) -> tuple[Int[np.ndarray, "P L"], State]:
        """The candidates to be evaluated next; none, when it has ended."""

    def tell(
        self, problem: Problem, state: State, candidates: Int[np.ndarray, "P L"], fitness: Float[np.ndarray, "P"]
    ) -> State:
        """The state after the candidates that it asked for were evaluated; the higher the fitness the better."""
        del problem, candidates, fitness
        return state

    def proposals(self, problem: Problem, state: State) -> Int[np.ndarray, "P L"]:
        """Candidates to be compared in the end though they may never have been evaluated, such as a mean."""
        del state
        return np.zeros((0, problem.space.units), np.int64)

    def group(self, problem: Problem, state: State) -> range | None:
        """The coordinates that are searched now; None is all of them."""
        del problem, state
        return None

    def spread(self, state: State) -> float:
        """How far the next candidates lie apart, where that means something (CMA-ES's sigma); else NaN."""
        del state
        return float("nan")


@dataclasses.dataclass(frozen=True)
class Fixed(Allocator):
    """A rule that needs no evaluating: one candidate, asked for once."""

    @abc.abstractmethod
    def candidate(self, problem: Problem) -> tuple[int, ...]:
        """The rule's candidate."""

    def begin(self, problem: Problem, seed: int) -> State:
        del problem, seed
        return {"done": np.zeros((), np.int64)}

    def ask(self, problem: Problem, state: State) -> tuple[Int[np.ndarray, "P L"], State]:
        if state["done"]:
            return np.zeros((0, problem.space.units), np.int64), state
        return np.array([self.candidate(problem)]), {"done": np.ones((), np.int64)}
