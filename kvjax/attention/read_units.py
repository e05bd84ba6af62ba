"""Read units: tokens or pages of a view that a decode step reads, by a score, and exact attention over them alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.dense import MASKED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadUnits:
    """Units of a view to read: tokens, or pages of consecutive entries. Leaves are arrays.

    Attributes:
        units: their indices, in any order; the row is a kv head, or a query head where each selects for itself.
        chosen: which of them count; the others fill the array up, and may be any unit.
    """

    units: Any  # [B, R, N] int32
    chosen: Any  # [B, R, N] bool


def filled_entries(positions: Int[Array, "B K C"], entries: Int[Array, "B"]) -> Bool[Array, "B K C"]:
    """Which entries of a view hold a key: the first `entries` of a slot, but for those that no position has."""
    return (positions >= 0) & (jnp.arange(positions.shape[2]) < entries[:, None, None])


def choose(
    scores: Float[Array, "B R U"], eligible: Bool[Array, "B R U"], count: int, most: Int[Array, "B"] | None = None
) -> ReadUnits:
    """The best `count` eligible units of each row in order, of equal ones the earlier; of a slot its `most` at most."""
    scores = jnp.where(scores == 0, 0, scores)  # top-k would put 0 before -0, which are equal
    values, units = jax.lax.top_k(jnp.where(eligible, scores, -jnp.inf), min(count, scores.shape[2]))
    chosen = values > -jnp.inf
    if most is not None:
        chosen &= jnp.arange(chosen.shape[2]) < most[:, None, None]
    return ReadUnits(units, chosen)


def attend_selected(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    filled: Bool[Array, "B K C"],
    selection: ReadUnits,
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K G D"]:
    """Exact attention of all query heads of a row over the selected units; zeros for a slot that selects nothing.

    Args:
        page_size: consecutive entries in a unit; 1 where units are tokens.
        scale: multiplies q.k before the softmax.

    Raises:
        ValueError: where the view is not a whole number of pages.
    """
    slots, kv_heads, group, head_dim = q.shape
    capacity = k.shape[2]
    if capacity % page_size:
        raise ValueError(f"capacity={capacity} is not a multiple of page_size={page_size}: round the view up")
    rows = selection.units.shape[1]
    heads = jnp.arange(rows) // (rows // kv_heads)
    at = (jnp.arange(slots)[:, None, None], heads[:, None], selection.units)

    def read(source: Array) -> Array:  # [B, K, C, ...] to [B, R, N * page_size, ...]
        pages = source.reshape(slots, kv_heads, capacity // page_size, page_size, *source.shape[3:])
        return pages[at].reshape(slots, rows, -1, *source.shape[3:])

    visible = read(filled) & jnp.repeat(selection.chosen, page_size, axis=2)
    queries = q.reshape(slots, rows, kv_heads * group // rows, head_dim)
    scores = jnp.einsum("brgd,brnd->brgn", queries, read(k), preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible[:, :, None], scores, MASKED)
    weights = jnp.where(visible[:, :, None], jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0)
    values = jnp.where(visible[..., None], read(v), 0)  # an empty entry may hold anything, and 0 * NaN is NaN
    out = jnp.einsum("brgn,brnd->brgd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    out = out / jnp.maximum(jnp.sum(weights, axis=-1), 1e-30)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
