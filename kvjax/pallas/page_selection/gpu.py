"""Page selection on a Hopper GPU: a block of threads a row, whose ranks lie in shared memory once.

The chosen pages are packed by tensor cores, since there is no sort, no prefix sum and no scatter here. Pages are taken
as chunks of 64: a product with a triangle counts the chosen pages of a chunk up to each, another the chunks before;
the n-th page is in the chunk whose span holds n.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvjax.attention.read_units import ReadUnits
from kvjax.pallas.hopper import TILED
from kvjax.pallas.page_selection.ranks import BITS, NEVER, limits, ranks

SIDE = 64  # chunks of a square, pages of a chunk, and pages that are packed at a time
SQUARE = (SIDE, SIDE)
PAGES = 10 * SIDE * SIDE  # of one row: 160 KiB of shared memory beside 40 KiB of operands
_LAYOUT = plgpu.Layout.WGMMA
_FLAT = plgpu.Layout.WG_STRIDED(SQUARE, vec_size=4)  # in which neighbours lie side by side: for all that is summed


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
        NotImplementedError: for more pages than shared memory has room for.
    """
    slots, rows, pages = scores.shape
    if pages > PAGES:
        raise NotImplementedError(f"{pages} pages: the ranks of more than {PAGES} do not fit into shared memory")
    count = min(count, pages)
    squares = pl.cdiv(pages, SIDE * SIDE)
    width = pl.cdiv(count, SIDE) * SIDE
    ranked = jnp.pad(
        ranks(scores, entries, page_size),
        ((0, 0), (0, 0), (0, squares * SIDE * SIDE - pages)),
        constant_values=NEVER,
    )

    def operand() -> Any:
        return plgpu.SMEM(SQUARE, jnp.bfloat16, transforms=TILED)

    units = plgpu.kernel(
        _kernel,
        out_type=jax.ShapeDtypeStruct((slots, rows, width), jnp.int32),
        scratch_types={
            "ranks": plgpu.SMEM((squares, *SQUARE), jnp.int32),
            "arrived": plgpu.Barrier(),
            **{name: operand() for name in ("up_to", "before", "chosen", "order", "inside")},
            "result": plgpu.SMEM((SIDE,), jnp.int32),
        },
        grid=(slots, rows),
        grid_names=("slot", "row"),
        # layouts are all given below; searching for them takes the compiler minutes
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(ranked.reshape(slots, rows, squares, *SQUARE), limits(slots, count, most))
    units = units[:, :, :count]
    return ReadUnits(jnp.maximum(units, 0), units >= 0)


def _kernel(ranked, limit_by_slot, out, **shared):
    slot, row = lax.axis_index("slot"), lax.axis_index("row")
    plgpu.copy_gmem_to_smem(ranked.at[slot, row], shared["ranks"], shared["arrived"])
    up_to, before = (_iota(0, _LAYOUT) <= _iota(1, _LAYOUT)), (_iota(1, _LAYOUT) < _iota(0, _LAYOUT))
    for name, triangle in (("up_to", up_to), ("before", before)):
        shared[name][...] = _whole(triangle).astype(jnp.bfloat16)
    plgpu.barrier_wait(shared["arrived"])
    squares = ranked.shape[2]

    def count(test):
        """Pages of the row that pass."""

        def add(square, total):
            rank = plgpu.load(shared["ranks"].at[square], layout=_FLAT)
            return total + jnp.where(test(rank, _places(square, _FLAT)), 1, 0)

        none = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.int32), _FLAT)
        return jnp.sum(lax.fori_loop(0, squares, add, none))

    limit = jnp.minimum(limit_by_slot[slot], count(lambda rank, _: rank > NEVER))

    def higher(step, least):
        tried = least + lax.shift_left(1, BITS - 1 - step)  # the first wraps round to 0
        return jnp.where(count(lambda rank, _: rank >= tried) >= limit, tried, least)

    least = lax.fori_loop(0, BITS, higher, jnp.int32(NEVER))
    left = limit - count(lambda rank, _: rank > least)  # for those that are equal, of which the first count
    tied = count(lambda rank, _: rank == least) > left  # else all of them are chosen
    pages = squares * SIDE * SIDE
    bits = pages.bit_length()

    def later(step, end):
        tried = end + lax.shift_left(1, bits - 1 - step)
        ties = count(lambda rank, place: (rank == least) & (place < tried))
        return jnp.where(ties <= left, tried, end)

    end = lax.fori_loop(0, jnp.where(tied, bits, 0), later, jnp.where(tied, 0, pages))

    @pl.loop(0, out.shape[2] // SIDE)
    def _(pack):  # a loop, so that what one pack needs is not kept for all: registers are few
        begin = pack * SIDE
        plgpu.wait_smem_to_gmem(0)  # the former result has left
        shared["result"][...] = _pack(least, end, limit, begin, squares, shared)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared["result"], out.at[slot, row, pl.ds(begin, SIDE)])

    plgpu.wait_smem_to_gmem(0)


def _pack(least, end, limit, begin, squares, shared):
    """The chosen pages of a row from the `begin`-th on, `SIDE` of them, and -1 where there are no more."""
    column = _LAYOUT.reduce(0)

    def add(square, carry):
        orders, chunk, passed = carry
        rank = plgpu.load(shared["ranks"].at[square], layout=_LAYOUT, optimized=False)  # rows share their banks
        chosen = (rank > NEVER) & ((rank > least) | ((rank == least) & (_places(square, _LAYOUT) < end)))
        own = jnp.sum(_whole(chosen), axis=1)
        shared["chosen"][...] = _whole(chosen).astype(jnp.bfloat16)
        plgpu.commit_smem()
        first = passed + jnp.sum(_product(shared["before"], shared["chosen"]), axis=1)
        lies = lax.broadcast_in_dim(first, SQUARE, [0])
        # from 1 on: whole numbers up to 64, which bfloat16 holds
        order = _product(shared["chosen"], shared["up_to"]) + (lies - begin.astype(jnp.float32))
        order = jnp.where((order > 0) & (order <= SIDE), order, 0.0)
        # read again, since the registers are few
        order = order * plgpu.load(shared["chosen"], layout=_LAYOUT).astype(jnp.float32)
        shared["order"][...] = order.astype(jnp.bfloat16)
        nth = (begin + _iota(1, _LAYOUT)).astype(jnp.float32)
        inside = _whole((lies <= nth) & (nth < lies + lax.broadcast_in_dim(own, SQUARE, [0])))
        shared["inside"][...] = inside.astype(jnp.bfloat16)  # one of a column at most, in all squares together
        number = (square * SIDE + _iota(0, _LAYOUT)).astype(jnp.float32)
        chunk = chunk + jnp.sum(inside * number, axis=0)
        plgpu.commit_smem()
        orders = orders + _product(shared["order"].transpose((1, 0)), shared["inside"])
        return orders, chunk, passed + jnp.sum(own)

    empty = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), _LAYOUT)
    none = plgpu.layout_cast(jnp.zeros((SIDE,), jnp.float32), column)
    orders, chunk, _ = lax.fori_loop(0, squares, add, (empty, none, jnp.float32(0)))
    lane_of_page = orders == (1 + _iota(1, _LAYOUT)).astype(jnp.float32)  # in each column the lane of its page
    lane = jnp.sum(jnp.where(lane_of_page, _iota(0, _LAYOUT).astype(jnp.float32), 0.0), axis=0)
    nth = begin + plgpu.broadcasted_iota(jnp.int32, (SIDE,), 0, layout=column)
    return jnp.where(nth < limit, chunk * SIDE + lane, -1.0).astype(jnp.int32)


def _iota(axis, layout):
    return plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=layout)


def _places(square, layout):
    """The pages' indices."""
    return (square * SIDE + _iota(0, layout)) * SIDE + _iota(1, layout)


def _whole(mask):
    return jnp.where(mask, 1.0, 0.0)


def _product(left, right):
    def products(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(SQUARE, jnp.float32))
