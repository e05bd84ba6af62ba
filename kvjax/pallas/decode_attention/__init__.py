"""Exact attention of one token a slot over all that its view holds."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import dense
from kvjax.pallas.decode_attention import gpu, tpu
from kvjax.pallas.dispatch import dispatch


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    *,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B H D"]:
    """As `dense.decode_attention` for views in the order of their positions; zeros for a slot without an entry.

    A ring, whose entries a window leaves behind, is not such a view.

    Args:
        k, v: what lies behind a slot's entries may be anything.
        entries: leading entries of a slot that are filled.
        scale: multiplies q.k before the softmax.
        implementation: see `dispatch`.
    """
    implementations = {"reference": reference, "tpu": tpu.decode_attention, "gpu": gpu.decode_attention}
    return dispatch("decode_attention", implementations, implementation, q, k, v, entries, scale=scale)


def reference(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    *,
    scale: float,
) -> Float[Array, "B H D"]:
    """In jax.numpy, everywhere."""
    places = jnp.arange(k.shape[2])
    positions = jnp.broadcast_to(jnp.where(places < entries[:, None, None], places, -1), k.shape[:3])
    return dense.decode_attention(q, k, v, positions, entries - 1, entries, scale=scale)
