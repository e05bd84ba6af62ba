"""The summary of a view's pages: for each `page_size` consecutive entries the largest and smallest key, elementwise.

For all queries, `sum_d max(q_d * min_d, q_d * max_d)` bounds q.k over the page from above; with max and min side by
side that is one matrix product of depth 2D.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def summarize(
    k: Float[Array, "*B C D"], filled: Bool[Array, "*B C"], page_size: int, dtype: Any = None
) -> Float[Array, "*B P 2 D"]:
    """The summary of all pages. A page without a filled entry is zero; the last page may be a partial one.

    Args:
        filled: which entries hold a key; others may be anything.
        dtype: of the summary, the keys' where not given. A narrower one rounds: it bounds nearly.
    """
    pad = -k.shape[-2] % page_size
    lead = [(0, 0)] * (k.ndim - 2)
    k = jnp.pad(k, [*lead, (0, pad), (0, 0)])
    filled = jnp.pad(filled, [*lead, (0, pad)])
    keys = k.reshape(*k.shape[:-2], -1, page_size, k.shape[-1])
    held = filled.reshape(*filled.shape[:-1], -1, page_size, 1)
    bounds = jnp.stack(
        [jnp.max(jnp.where(held, keys, -jnp.inf), axis=-2), jnp.min(jnp.where(held, keys, jnp.inf), axis=-2)], axis=-2
    )
    return jnp.where(jnp.any(held, axis=-2, keepdims=True), bounds, 0).astype(dtype or k.dtype)


def update(
    bounds: Float[Array, "B K P 2 D"],
    k: Float[Array, "B K C D"],
    positions: Int[Array, "B K C"],
    written: Int[Array, "B"],
    active: Bool[Array, "B"],
    page_size: int,
) -> Float[Array, "B K P 2 D"]:
    """The summary after entry `written` of each active slot has changed: that entry's page is summarized again.

    Reads `page_size` keys a head and writes one page. Nothing is carried over from the page's former summary, so a
    slot may be given to another request without clearing it.

    Args:
        positions: of each entry, negative where it holds no key.
    """
    slots, heads, capacity, _ = k.shape
    page = written // page_size
    entries = page[:, None] * page_size + jnp.arange(page_size)
    inside = jnp.minimum(entries, capacity - 1)  # of the last page, where it is a partial one
    # row by row: XLA would want what is read or written together side by side on a TPU, and copy the view to that order
    slot, head = jnp.arange(slots)[:, None, None], jnp.arange(heads)[:, None]
    rows = (slot, head, inside[:, None])
    held = (positions[rows] >= 0) & (entries < capacity)[:, None]
    new = summarize(k[rows], held, page_size, bounds.dtype)[:, :, 0]
    # an idle slot's page lies outside, and what is written there is dropped
    at = (slot, head, jnp.where(active, page, bounds.shape[2])[:, None, None], jnp.arange(2))
    return bounds.at[at].set(new, mode="drop", unique_indices=True)
