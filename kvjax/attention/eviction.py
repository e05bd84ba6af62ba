"""Eviction (RocketKV's stage 1): the tokens of a prompt that enter its view, decided once after prefill.

A method scores tokens, higher is kept; everything else is common. Layers with a sliding window keep their ring and
are the caller's to skip.
"""

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.observation import Received, attention_received, max_pool
from kvjax.attention.retention import retain
from kvjax.attention.streaming import streaming_scores


@dataclasses.dataclass(frozen=True)
class Eviction(abc.ABC):
    """A way to score the tokens of a prompt. Pure functions, safe to trace with the method as a static argument.

    Attributes:
        window: the last positions of a prompt, whose queries are seen by `score` and which always stay.
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
    def score(
        self,
        queries: Float[Array, "W H D"],
        k: Float[Array, "K T D"],
        length: Int[Array, ""],
        observed: Int[Array, ""],
        *,
        scale: float,
    ) -> Float[Array, "R T"]:
        """A score for each token before the last `observed` ones of `length`; those behind do not matter.

        Args:
            queries: of positions `length - W` to `length - 1`, in order, rotated.
            k: keys of positions 0 to T - 1; behind `length` they may be anything.
            observed: how many of the queries count.
        """

    def select(
        self,
        queries: Float[Array, "W H D"],
        k: Float[Array, "K T D"],
        length: Int[Array, ""],
        *,
        max_retained: int,
        capacity: int,
        scale: float,
        turn: Int[Array, ""] | None = None,
        budget: Int[Array, ""] | Int[Array, "R 1"] | None = None,
    ) -> Int[Array, "R C"]:
        """The positions that a view keeps, ascending in each row, then -1; all of a prompt of `max_retained` tokens.

        Args:
            max_retained: most prompt tokens to keep, static: the capacity less the tokens to be generated.
            turn: tokens of the conversation's last turn, where `length` counts earlier turns too. The window does
                not reach beyond it.
            budget: see `retain`; at least `min_retained`.

        Raises:
            ValueError: where `max_retained` lies outside `min_retained` to `capacity`.
        """
        if max_retained < self.min_retained:
            raise ValueError(
                f"max_retained={max_retained} is below the {self.min_retained} tokens {self} always keeps: raise the "
                "capacity"
            )
        observed = jnp.minimum(self.window, length if turn is None else turn)
        scores = self.score(queries, k, length, observed, scale=scale)
        return retain(scores, length, observed, max_retained=max_retained, capacity=capacity, budget=budget)


@dataclasses.dataclass(frozen=True)
class Observation(Eviction):
    """The attention that the last queries pay to a token, or to its neighbours: RocketKV's stage 1, and SnapKV.

    RocketKV (arXiv 2502.14051) sums over the heads of a group and pools wide. SnapKV (arXiv 2404.14469) as published
    pools over 7 and keeps tokens for each query head (`per_head`). The first `sinks` tokens may be kept whatever they
    score, which no paper has.

    Attributes:
        received: what computes the attention; a method stays the same whoever does.
    """

    kernel: int = 63
    sinks: int = 0
    received: Received = dataclasses.field(default=attention_received, compare=False, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sinks(self.sinks)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: a pooling kernel has a middle, so it is an odd number from 1 on")

    @property
    def min_retained(self) -> int:
        return self.sinks + self.window

    def score(
        self,
        queries: Float[Array, "W H D"],
        k: Float[Array, "K T D"],
        length: Int[Array, ""],
        observed: Int[Array, ""],
        *,
        scale: float,
    ) -> Float[Array, "R T"]:
        scores = self.received(queries, k, length, observed, scale=scale, per_head=self.per_head)
        scores = max_pool(scores, self.kernel, length - observed)
        return jnp.where(jnp.arange(k.shape[1]) < self.sinks, jnp.inf, scores) if self.sinks else scores


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

    def score(
        self,
        queries: Float[Array, "W H D"],
        k: Float[Array, "K T D"],
        length: Int[Array, ""],
        observed: Int[Array, ""],
        *,
        scale: float,
    ) -> Float[Array, "R T"]:
        del length, observed, scale
        rows = queries.shape[1] if self.per_head else k.shape[0]
        return streaming_scores(rows, k.shape[1], self.sinks)


def _check_sinks(sinks: int) -> None:
    if sinks < 0:
        raise ValueError(f"sinks={sinks} is negative")
