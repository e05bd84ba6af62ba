"""Decode attention of one layer: dense, sparse by selection, or either by slot, composed of a backend's operations."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.ops import PageView
from kvjax.attention.selection import Selection


def attend(
    pages: PageView,
    selection: Selection | None = None,
    tokens: Int[Array, "B"] | None = None,
    dense_threshold: Int[Array, "B"] | None = None,
    *,
    window: int | None = None,
) -> Float[Array, "B K G D"]:
    """Attends one token a slot to all entries of its view, or to those that `selection` reads of it.

    Args:
        selection: None reads whole views.
        tokens, dense_threshold: of each slot, at most those of the selection, which they are where not given.
        window: of a layer that slides, and selects nothing; see `dense.decode_attention`.
    """
    ops = pages.ops
    if selection is None:
        return ops.decode_attention(pages, window=window)
    units = selection.select(pages, tokens)
    out = ops.selected_attention(pages, units, page_size=selection.unit)
    if selection.dense_threshold == 0:
        return out
    # costs a slot nothing that is not dense: none of its entries are read, and its output stays what it was
    few = pages.entries <= (selection.dense_threshold if dense_threshold is None else dense_threshold)
    whole = ops.decode_attention(dataclasses.replace(pages, entries=jnp.where(few, pages.entries, 0)), window=None)
    return jnp.where(few[:, None, None, None], whole, out)
