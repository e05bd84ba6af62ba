"""Attention over selected pages on a TPU: a page is one copy from HBM, and the next tile arrives while one is used."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED
from kvjax.attention.read_units import ReadUnits

TILE = 512  # entries that are in VMEM at a time, twice


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
    """As `reference`; the selection's indices lie in SMEM, row by row.

    Raises:
        NotImplementedError: for pages below 8 entries, heads that fill no lane, or a view of no whole pages.
    """
    slots, kv_heads, group, head_dim = q.shape
    capacity, rows = k.shape[2], selection.units.shape[1]
    if capacity % page_size:
        raise NotImplementedError(f"capacity={capacity} is not a whole number of pages of {page_size}")
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    pages = max(1, TILE // page_size)
    count = selection.units.shape[2]
    pages = min(pages, count)
    extra = -count % pages
    units, chosen = (jnp.pad(x, ((0, 0), (0, 0), (0, extra))) for x in (selection.units, selection.chosen))
    held = jnp.where(chosen, jnp.clip(entries[:, None, None] - units * page_size, 0, page_size), 0)
    seen = jnp.arange(page_size) < held[..., None]
    bias = jnp.where(seen, 0.0, MASKED).reshape(slots, rows, -1, 1, pages * page_size)
    tiles = bias.shape[2]
    width = kv_heads * group // rows
    kernel = functools.partial(
        _kernel, page_size=page_size, pages=pages, tiles=tiles, share=rows // kv_heads, scale=scale
    )
    paged = (slots, kv_heads, capacity // page_size, page_size, head_dim)

    def scalars() -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, count + extra), lambda b, r: (b, r, 0, 0), memory_space=pltpu.SMEM)

    row = pl.BlockSpec((1, 1, width, head_dim), lambda b, r: (b, r, 0, 0))
    buffer = pltpu.VMEM((2, pages, page_size, head_dim), k.dtype)
    out = pl.pallas_call(
        kernel,
        grid=(slots, rows),
        in_specs=[
            scalars(),
            scalars(),
            row,
            pl.BlockSpec((1, 1, tiles, 1, pages * page_size), lambda b, r: (b, r, 0, 0, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((slots, rows, width, head_dim), q.dtype),
        scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2))],
        name="selected_attention",
    )(
        units[:, :, None].astype(jnp.int32),
        held[:, :, None].astype(jnp.int32),
        q.reshape(slots, rows, width, head_dim),
        bias,
        k.reshape(paged),
        v.reshape(paged),
    )
    return out.reshape(q.shape)


def _kernel(
    units, held, q_ref, bias, k_hbm, v_hbm, out, k_buffer, v_buffer, arrived, *, page_size, pages, tiles, share, scale
):
    slot, head = pl.program_id(0), pl.program_id(1) // share

    def copies(tile, page, half):
        source = (slot, head, units[0, 0, 0, tile * pages + page])
        return (
            pltpu.make_async_copy(k_hbm.at[source], k_buffer.at[half, page], arrived.at[0, half]),
            pltpu.make_async_copy(v_hbm.at[source], v_buffer.at[half, page], arrived.at[1, half]),
        )

    def each(tile, half, act):
        @pl.loop(0, pages)
        def _(page):
            @pl.when(held[0, 0, 0, tile * pages + page] > 0)
            def _():
                for copy in copies(tile, page, half):
                    act(copy)

    def fetch(tile, half):
        each(tile, half, lambda copy: copy.start())

    fetch(0, 0)
    q = q_ref[0, 0]
    size = (pages * page_size, q.shape[1])

    def body(tile, carry):
        maximum, total, acc = carry
        half = jax.lax.rem(tile, 2)

        @pl.when(tile + 1 < tiles)
        def _():
            fetch(tile + 1, 1 - half)

        each(tile, half, lambda copy: copy.wait())

        # what no entry holds may be NaN, and 0 * NaN is NaN
        @pl.loop(0, pages)
        def _(page):
            full = held[0, 0, 0, tile * pages + page]

            @pl.when(full < page_size)
            def _():
                values = v_buffer[half, page]
                inside = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < full
                v_buffer[half, page] = jnp.where(inside, values, 0)

        keys, values = k_buffer[half].reshape(size), v_buffer[half].reshape(size)
        scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        seen = bias[0, 0, tile] == 0
        scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new), 0)
        shrink = jnp.exp(maximum - new)
        part = jax.lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return new, total * shrink + jnp.sum(weights, axis=1, keepdims=True), acc * shrink + part

    rows = (q.shape[0], 1)
    start = (jnp.full(rows, MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    _, total, acc = jax.lax.fori_loop(0, tiles, body, start)
    out[0, 0] = (acc / jnp.maximum(total, 1e-30)).astype(out.dtype)
