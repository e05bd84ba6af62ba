"""Attention over selected pages on a Hopper GPU: a page is one copy from the cache to shared memory."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED
from kvjax.attention.read_units import ReadUnits
from kvjax.pallas import hopper


def selected_attention(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    selection: ReadUnits,
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K G D"]:
    """As `reference`.

    Raises:
        NotImplementedError: for other types than 16-bit floats, pages that fill no rows of a tile, small views.
    """
    hopper.check(q, k)
    if page_size % 8 or hopper.TILE % page_size:
        raise NotImplementedError(f"page_size={page_size}: a page is 8, 16, 32 or 64 rows of a tile in shared memory")
    if k.shape[2] % page_size:
        raise NotImplementedError(f"capacity={k.shape[2]} is not a whole number of pages of {page_size}")
    slots, _, _, head_dim = q.shape
    rows = selection.units.shape[1]
    per_tile = hopper.TILE // page_size
    extra = -selection.units.shape[2] % max(per_tile, 4)  # a copy is of 16 bytes at least
    units, chosen = (jnp.pad(x, ((0, 0), (0, 0), (0, extra))) for x in (selection.units, selection.chosen))
    held = jnp.where(chosen, jnp.clip(entries[:, None, None] - units * page_size, 0, page_size), 0)
    seen = jnp.where(jnp.arange(page_size) < held[..., None], 0.0, MASKED).reshape(slots, rows, -1)
    tiles = held.reshape(slots, rows, -1, per_tile)
    whole = jnp.repeat(jnp.all(tiles == page_size, axis=3), per_tile, axis=2)
    # a page that does not count is not read, unless its tile is: then the first page is, which is always there
    table = jnp.stack([jnp.where(held > 0, units, 0), whole.astype(units.dtype)], axis=2).astype(jnp.int32)
    order = jnp.arange(1, tiles.shape[2] + 1)
    used = jnp.max(jnp.where(jnp.any(tiles > 0, axis=3), order, 0), axis=2).astype(jnp.int32)
    pages = hopper.Pages(page_size, used, table, seen)
    return hopper.attend(q.reshape(slots, rows, -1, head_dim), k, v, pages, scale=scale).reshape(q.shape)
