"""Exact attention of one token a slot over the pages that were selected for it, and over nothing else."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.read_units import ReadUnits, attend_selected
from kvjax.pallas.dispatch import dispatch
from kvjax.pallas.selected_attention import gpu, tpu


def selected_attention(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    selection: ReadUnits,
    *,
    page_size: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B K G D"]:
    """As `read_units.attend_selected`; zeros for a slot that selects nothing.

    Args:
        k, v: what lies behind a slot's entries may be anything.
        entries: leading entries of a slot that are filled.
        selection: of pages; each row of it is a kv head or a query head.
        scale: multiplies q.k before the softmax.
        implementation: see `dispatch`.
    """
    implementations = {"reference": reference, "tpu": tpu.selected_attention, "gpu": gpu.selected_attention}
    arguments = q, k, v, entries, selection
    return dispatch("selected_attention", implementations, implementation, *arguments, page_size=page_size, scale=scale)


def reference(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    selection: ReadUnits,
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K G D"]:
    """In jax.numpy, everywhere."""
    filled = jnp.broadcast_to(jnp.arange(k.shape[2]) < entries[:, None, None], k.shape[:3])
    return attend_selected(q, k, v, filled, selection, page_size=page_size, scale=scale)
