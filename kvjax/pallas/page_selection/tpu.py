"""Page selection on a TPU: the ranks lie in VMEM once, the rows of eight query or kv heads in the sublanes of a chunk.

Rows are searched together, as many as fit: the search of one alone would wait for each of its counts. Then a row at a
time is packed by matrix products, since there is no sort, no prefix sum and no scatter here: one with a triangle
counts the chosen pages of a chunk up to each, one the chunks before; the n-th page is in the chunk whose span holds n.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.read_units import ReadUnits
from kvjax.pallas.page_selection.ranks import BITS, NEVER, limits, ranks

LANES, SUBLANES = 128, 8
PAGES = 1 << 16  # of one row, eight of which take 2 MiB
TOGETHER = 1 << 21  # bytes of ranks in VMEM at a time, twice


def page_selection(
    scores: Float[Array, "B R P"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    count: int,
    most: Int[Array, "B"] | None = None,
) -> ReadUnits:
    """As `reference`, the pages of a row by their index.

    Raises:
        NotImplementedError: for more pages than VMEM has room for.
    """
    slots, rows, pages = scores.shape
    if pages > PAGES:
        raise NotImplementedError(f"{pages} pages: the ranks of more than {PAGES} do not fit into VMEM")
    count = min(count, pages)
    width = pl.cdiv(count, LANES) * LANES
    chunks = pl.cdiv(pages, LANES * SUBLANES) * SUBLANES
    groups = pl.cdiv(slots * rows, SUBLANES)
    together = min(groups, max(1, TOGETHER // (chunks * SUBLANES * LANES * 4)))
    padded = ((0, groups * SUBLANES - slots * rows), (0, chunks * LANES - pages))
    ranked = jnp.pad(ranks(scores, entries, page_size).reshape(-1, pages), padded, constant_values=NEVER)
    row_limits = jnp.pad(jnp.repeat(limits(slots, count, most), rows), padded[0])
    units = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(groups, together),),
        in_specs=[
            pl.BlockSpec((together, SUBLANES, 1), lambda i: (i, 0, 0)),
            pl.BlockSpec((together, chunks, SUBLANES, LANES), lambda i: (i, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((together, SUBLANES, width), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((groups, SUBLANES, width), jnp.int32),
        scratch_shapes=[pltpu.VMEM((together, SUBLANES, LANES), jnp.int32)] * 2,
        name="page_selection",
    )(
        row_limits.reshape(groups, SUBLANES, 1),
        # as they lie in memory already: tiles of eight rows by 128 pages
        ranked.reshape(groups, SUBLANES, chunks, LANES).swapaxes(1, 2),
    )
    units = units.reshape(-1, width)[: slots * rows, :count].reshape(slots, rows, count)
    return ReadUnits(jnp.maximum(units, 0), units >= 0)


def _kernel(row_limits, ranked, out, threshold, bound):
    groups, chunks = ranked.shape[:2]
    part = (groups, SUBLANES, SUBLANES, LANES)  # of some chunks, each the same lanes of eight rows

    def count(test):
        """Pages of each row that pass. [G, 8, 1]"""

        def add(index, total):
            place = (index * SUBLANES + _iota(part, 1)) * LANES + _iota(part, 3)
            passed = test(ranked[:, pl.ds(index * SUBLANES, SUBLANES)], place)
            return total + jnp.sum(jnp.where(passed, 1.0, 0.0), axis=1)

        none = jnp.zeros((groups, SUBLANES, LANES), jnp.float32)
        return jnp.sum(jax.lax.fori_loop(0, chunks // SUBLANES, add, none), axis=2, keepdims=True)

    limit = jnp.minimum(row_limits[...].astype(jnp.float32), count(lambda rank, _: rank > NEVER))

    def higher(step, least):
        tried = least + jax.lax.shift_left(1, BITS - 1 - step)  # the first wraps round to 0
        return jnp.where(count(lambda rank, _: rank >= tried[:, None]) >= limit, tried, least)

    least = jax.lax.fori_loop(0, BITS, higher, jnp.full((groups, SUBLANES, 1), NEVER, jnp.int32))
    left = limit - count(lambda rank, _: rank > least[:, None])  # for those that are equal, of which the first count
    ties = count(lambda rank, _: rank == least[:, None])
    tied = jnp.max(ties - left) > 0  # in any row; else all of them are chosen
    pages = chunks * LANES
    bits = pages.bit_length()

    def later(step, end):
        tried = end + jax.lax.shift_left(1, bits - 1 - step)
        passed = count(lambda rank, place: (rank == least[:, None]) & (place < tried[:, None]))
        return jnp.where(passed <= left, tried, end)

    start = jnp.full((groups, SUBLANES, 1), jnp.where(tied, 0, pages))
    end = jax.lax.fori_loop(0, jnp.where(tied, bits, 0), later, start)
    threshold[...] = jnp.broadcast_to(least, threshold.shape)
    bound[...] = jnp.broadcast_to(end, bound.shape)

    square, chunked = (LANES, LANES), (chunks, LANES)
    up_to = _whole(_iota(square, 0) <= _iota(square, 1))
    before = _whole(_iota((chunks, chunks), 1) < _iota((chunks, chunks), 0))
    nth = _iota((1, out.shape[2]), 1).astype(jnp.float32)

    @pl.loop(0, groups * SUBLANES)
    def _(row):
        group, line = row // SUBLANES, pl.ds(jax.lax.rem(row, SUBLANES), 1)
        rank = ranked[group, :, line].reshape(chunked)
        least, end = threshold[group, line], bound[group, line]
        place = _iota(chunked, 0) * LANES + _iota(chunked, 1)
        chosen = _whole((rank > NEVER) & ((rank > least) | ((rank == least) & (place < end))))
        # whole numbers up to 128, which bfloat16 holds
        order = _product(chosen, up_to, 1) * chosen
        first = jnp.sum(_product(before, chosen, 1), axis=1, keepdims=True)
        # [chunks, N]: one of a column, none beyond the last page
        inside = _whole((first <= nth) & (nth < first + jnp.sum(chosen, axis=1, keepdims=True)))
        offset = nth + 1 - jnp.sum(inside * first, axis=0, keepdims=True)
        orders = _product(order, inside, 0)  # [128, N]: of the n-th page's chunk
        lane = jnp.sum(
            jnp.where(orders == offset, _iota(orders.shape, 0).astype(jnp.float32), 0), axis=0, keepdims=True
        )
        chunk = jnp.sum(inside * _iota(inside.shape, 0).astype(jnp.float32), axis=0, keepdims=True)
        held = jnp.sum(inside, axis=0, keepdims=True)
        out[group, line] = jnp.where(held > 0, chunk * LANES + lane, -1).astype(jnp.int32)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _whole(mask: Array) -> Array:
    return jnp.where(mask, 1.0, 0.0)


def _product(left: Array, right: Array, axis: int) -> Array:
    """Over an axis of the left and the first of the right; exact for whole numbers up to 256."""
    left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return jax.lax.dot_general(left, right, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)
