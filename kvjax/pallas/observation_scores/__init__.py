"""Observation scores: the attention that each token of a prompt receives from its last queries (stage 1)."""

from jaxtyping import Array, Float, Int

from kvjax.attention import observation
from kvjax.pallas.dispatch import dispatch
from kvjax.pallas.observation_scores import gpu, tpu


def observation_scores(
    queries: Float[Array, "W H D"],
    k: Float[Array, "K T D"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    *,
    pooling_kernel: int,
    scale: float,
    per_head: bool = False,
    implementation: str | None = None,
) -> Float[Array, "R T"]:
    """As `eviction.Observation.score` without sinks: attention received, max-pooled over the neighbours of a token.

    Args:
        queries: of positions `length - W` to `length - 1`, rotated; those that do not count may be anything.
        k: keys of positions 0 to T - 1; what lies behind `length` may be anything.
        observed: only the last so many queries count; 1 to min(W, length).
        pooling_kernel: tokens that are pooled, an odd number; see `max_pool`.
        scale: multiplies q.k before the softmax.
        per_head: a row for each query head instead of their sum for each kv head.
        implementation: see `dispatch`.

    Returns:
        Scores of the tokens before `length - observed`; those behind do not matter.
    """
    arguments = queries, k, length, observed
    received = attention_received(*arguments, scale=scale, per_head=per_head, implementation=implementation)
    return observation.max_pool(received, pooling_kernel, length - observed)


def attention_received(
    queries: Float[Array, "W H D"],
    k: Float[Array, "K T D"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    *,
    scale: float,
    per_head: bool = False,
    implementation: str | None = None,
) -> Float[Array, "R T"]:
    """As `observation.attention_received`, before it is pooled.

    Returns:
        What each token gets; from `length` on it does not matter.
    """
    implementations = {
        "reference": observation.attention_received,
        "tpu": tpu.attention_received,
        "gpu": gpu.attention_received,
    }
    arguments = queries, k, length, observed
    return dispatch("observation_scores", implementations, implementation, *arguments, scale=scale, per_head=per_head)
