"""Exact attention of one chunk of a prompt to all keys up to itself, over a workspace with room for many more."""

from jaxtyping import Array, Float, Int

from kvjax.attention import dense
from kvjax.pallas.dispatch import dispatch
from kvjax.pallas.prefill_attention import gpu, tpu


def prefill_attention(
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "P H D"]:
    """As `dense.prefill_attention`.

    Args:
        q: queries of positions `start` to `start + P - 1`, rotated.
        k, v: of positions 0 to T - 1, the chunk's own among them; what lies behind the chunk may be anything.
        start: a multiple of 8 for a GPU, or the output is NaN; all whole chunks of a prompt begin at one.
        scale: multiplies q.k before the softmax.
        window: position p sees keys in (p - window, p]; None sees all.
        implementation: see `dispatch`.
    """
    implementations = {
        "reference": dense.prefill_attention,
        "tpu": tpu.prefill_attention,
        "gpu": gpu.prefill_attention,
    }
    arguments = q, k, v, start
    return dispatch("prefill_attention", implementations, implementation, *arguments, scale=scale, window=window)
