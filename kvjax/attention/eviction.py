"""Eviction (RocketKV's stage 1): the tokens of a prompt that enter its view, decided once after prefill.

A rule scores tokens, higher is retained; everything else is common. Layers with a sliding window keep their ring and
are the caller's to skip.
"""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.observation import max_pool
from kvjax.attention.ops import REFERENCE_OPS, Ops
from kvjax.attention.retention import retain


@dataclasses.dataclass(frozen=True)
class PromptState:
    """A prompt in one layer after its prefill, as eviction rules see it.

    Attributes:
        queries: of positions `length - W` to `length - 1`, in order, rotated; meaningless where that is negative.
        k, v: of positions 0 to T - 1, keys rotated; behind `length` they may be anything.
        length: tokens of the prompt.
        turn_start: first position of the conversation's last turn, where `length` counts earlier turns too.
        scale: multiplies q.k before the softmax.
        ops: the backend's operations.
    """

    queries: Float[Array, "W H D"]
    k: Float[Array, "K T D"]
    v: Float[Array, "K T D"]
    length: Int[Array, ""]
    turn_start: Int[Array, ""] | int = 0
    _: dataclasses.KW_ONLY
    scale: float
    ops: Ops = REFERENCE_OPS

    @property
    def observed(self) -> Int[Array, ""]:
        """How many of the queries count: those of the last turn."""
        return jnp.minimum(len(self.queries), self.length - self.turn_start)

    def attention_received(self, *, per_head: bool = False) -> Float[Array, "R T"]:
        """The attention that each token receives from the queries that count, see `observation.attention_received`."""
        return self.ops.attention_received(
            self.queries, self.k, self.length, self.observed, scale=self.scale, per_head=per_head
        )


@dataclasses.dataclass(frozen=True)
class Eviction(abc.ABC):
    """A rule that scores the tokens of a prompt. Pure functions, safe to trace with the rule as a static argument.

    Attributes:
        window: the last positions of a prompt, whose queries `score` sees and which always stay.
        per_head: each query head keeps tokens of its own, so that the view has as many kv heads as query heads.
    """

    window: int = 32
    per_head: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least the last position is always kept")

    @property
    def min_retained(self) -> int:
        """The fewest tokens that a view may keep of a prompt."""
        return self.window

    @abc.abstractmethod
    def score(self, state: PromptState) -> Float[Array, "R T"]:
        """A score for each token before the last `state.observed` ones of the prompt; those behind do not matter."""

    def select(
        self,
        state: PromptState,
        *,
        max_retained: int,
        capacity: int,
        budget: Int[Array, ""] | Int[Array, "R 1"] | None = None,
    ) -> Int[Array, "R C"]:
        """The positions that a view keeps, ascending in each row, then -1; all of a prompt of `max_retained` tokens.

        Args:
            state: with the queries of at least the last `window` positions; older ones do not count.
            max_retained: most prompt tokens to keep, static: the capacity less the tokens to be generated.
            budget: see `retain`; at least `min_retained`.

        Raises:
            ValueError: where `max_retained` lies outside `min_retained` to `capacity`.
        """
        if max_retained < self.min_retained:
            raise ValueError(
                f"max_retained={max_retained} is below the {self.min_retained} tokens {self} always keeps: raise the "
                "capacity"
            )
        state = dataclasses.replace(state, queries=state.queries[-self.window :])
        return retain(
            self.score(state),
            state.length,
            state.observed,
            max_retained=max_retained,
            capacity=capacity,
            budget=budget,
        )


@dataclasses.dataclass(frozen=True)
class Observation(Eviction):
    """The attention that the last queries pay to a token, or to its neighbours: RocketKV's stage 1, and SnapKV.

    RocketKV (arXiv 2502.14051) sums over the heads of a group and pools wide. SnapKV (arXiv 2404.14469) as published
    pools over 7 and keeps tokens for each query head (`per_head`). The first `sinks` tokens may be kept whatever they
    score, which no paper has.
    """

    kernel: int = 63
    sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sinks(self.sinks)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: a pooling kernel has a middle, so it is an odd number from 1 on")

    @property
    def min_retained(self) -> int:
        return self.sinks + self.window

    def score(self, state: PromptState) -> Float[Array, "R T"]:
        received = state.attention_received(per_head=self.per_head)
        scores = max_pool(received, self.kernel, state.length - state.observed)
        return jnp.where(jnp.arange(scores.shape[1]) < self.sinks, jnp.inf, scores) if self.sinks else scores


@dataclasses.dataclass(frozen=True)
class Streaming(Eviction):
    """The first `sinks` tokens and the last ones (StreamingLLM, arXiv 2309.17453). Looks at no query.

    Keys keep the rotation of their position, where the paper renumbers them by their place in the cache.
    """

    window: int = 1
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sinks(self.sinks)

    @property
    def min_retained(self) -> int:
        return self.sinks + self.window

    def score(self, state: PromptState) -> Float[Array, "R T"]:
        rows = state.queries.shape[1] if self.per_head else len(state.k)
        places = jnp.arange(state.k.shape[1], dtype=jnp.float32)  # exact up to 2 ** 24 tokens
        return jnp.broadcast_to(jnp.where(places < self.sinks, jnp.inf, places), (rows, len(places)))


def _check_sinks(sinks: int) -> None:
    if sinks < 0:
        raise ValueError(f"sinks={sinks} is negative")
