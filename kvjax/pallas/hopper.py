"""Attention of one token on a Hopper GPU, over pages of a cache that lie anywhere in it.

Keys are the rows of the product and the queries of a group its columns (`S^T = K Q^T`), because a tensor core takes
64 rows at least and 8 columns: a group of 4 wastes half of it, not fifteen sixteenths. The sequence is split over
blocks of threads, which a decode step has too few of otherwise; what each has seen is merged afterwards.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

TILE = 64  # keys at a time: the rows of one product
STAGES = 3  # tiles in shared memory: 96 KiB of it at head dim 128, so that two blocks fit on a multiprocessor
COLUMNS = 8  # the fewest of a product
MULTIPROCESSORS = 132  # of an H200; with fewer the splits queue
# how tensor cores want 16-bit operands in shared memory
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
_LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Pages:
    """Which pages each row of query heads reads, as tiles of a whole number of them.

    Attributes:
        size: entries of a page.
        used: leading tiles of a row that hold anything.
        table: the pages' indices, and from a tile's first page on, whether all of the tile's entries count.
        seen: 0 for each entry that counts, `MASKED` for the others.
    """

    size: int
    used: Int[Array, "B R"]
    table: Int[Array, "B R 2 N"]
    seen: Float[Array, "B R M"]


def check(q: Float[Array, "B K G D"], k: Float[Array, "B K C D"]) -> None:
    """Raises NotImplementedError, with the reason, where the kernel does not serve these arrays."""
    head_dim, capacity = k.shape[3], k.shape[2]
    if k.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k.dtype:
        raise NotImplementedError(f"queries of {q.dtype} and keys of {k.dtype}: tensor cores take two 16-bit operands")
    if head_dim % TILE:
        raise NotImplementedError(f"head_dim={head_dim} is not a multiple of the {TILE} rows of a product")
    if capacity < TILE:
        raise NotImplementedError(f"capacity={capacity} is less than the {TILE} keys that are read at a time")


def attend(
    q: Float[Array, "B R G D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    pages: Pages | Int[Array, "B"],
    *,
    scale: float,
) -> Float[Array, "B R G D"]:
    """Attends the queries of each row to pages, or to the first so many entries of each slot."""
    slots, rows, group, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    columns = -(-group // COLUMNS) * COLUMNS
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, columns - group), (0, 0)))
    tiles = pages.seen.shape[2] // TILE if isinstance(pages, Pages) else -(-capacity // TILE)
    splits = max(1, min(-(-2 * MULTIPROCESSORS // (slots * rows)), tiles // STAGES))
    per_tile = TILE // pages.size if isinstance(pages, Pages) else 1

    def shared(*shape: int, dtype: Any = k.dtype) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=TILED)

    scratch = {
        "queries": shared(columns, head_dim),
        "keys": shared(STAGES, TILE, head_dim),
        "values": shared(STAGES, TILE, head_dim),
        "weights": shared(columns, TILE),
        "sums": plgpu.SMEM((head_dim, columns), jnp.float32),
        "highest": plgpu.SMEM((columns,), jnp.float32),
        "denominator": plgpu.SMEM((columns,), jnp.float32),
        "once": plgpu.Barrier(num_arrivals=1),
        "keys_arrived": plgpu.Barrier(num_arrivals=per_tile, num_barriers=STAGES),
        "values_arrived": plgpu.Barrier(num_arrivals=per_tile, num_barriers=STAGES),
    }
    if isinstance(pages, Pages):
        inputs: tuple[Array, ...] = (pages.used, pages.table, pages.seen)
        scratch["pages"] = plgpu.SMEM(pages.table.shape[2:], jnp.int32)
        scratch["mask"] = plgpu.SMEM((STAGES, TILE), jnp.float32)
        scratch["once"] = plgpu.Barrier(num_arrivals=2)
        scratch["keys_arrived"] = plgpu.Barrier(num_arrivals=per_tile + 1, num_barriers=STAGES)
        body, size = _selected, pages.size
    else:
        inputs, body, size = (pages,), _dense, TILE
    out, most, total = plgpu.kernel(
        functools.partial(body, scale=scale, splits=splits, share=rows // kv_heads, page_size=size),
        out_type=(
            jax.ShapeDtypeStruct((slots, rows, splits, head_dim, columns), jnp.float32),
            jax.ShapeDtypeStruct((slots, rows, splits, columns), jnp.float32),
            jax.ShapeDtypeStruct((slots, rows, splits, columns), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(slots, rows, splits),
        grid_names=("slot", "row", "split"),
    )(queries, k, v, *inputs)
    return _merge(out, most, total)[:, :, :group].astype(q.dtype)


def _merge(
    out: Float[Array, "B R P D N"], most: Float[Array, "B R P N"], total: Float[Array, "B R P N"]
) -> Float[Array, "B R N D"]:
    """What the splits have seen, as one softmax. Zeros where none has seen anything."""
    weight = jnp.exp(most - jnp.max(most, axis=2, keepdims=True))
    total = jnp.sum(total * weight, axis=2)
    out = jnp.sum(out * weight[:, :, :, None], axis=2) / jnp.maximum(total, 1e-30)[:, :, None]
    return out.swapaxes(2, 3)


def _selected(q, k, v, used, table, seen, out, most, total, *, scale, splits, share, page_size, **shared):
    """The kernel over selected pages."""
    slot, row = lax.axis_index("slot"), lax.axis_index("row")
    plgpu.copy_gmem_to_smem(table.at[slot, row], shared["pages"], shared["once"])
    per_tile = TILE // page_size

    def fetch(tile, stage):
        for page in range(per_tile):
            begin = shared["pages"][0, tile * per_tile + page] * page_size
            for source, name in ((k, "keys"), (v, "values")):
                plgpu.copy_gmem_to_smem(
                    source.at[slot, row // share, pl.ds(begin, page_size)],
                    shared[name].at[stage, pl.ds(page * page_size, page_size)],
                    shared[f"{name}_arrived"].at[stage],
                )
        keep = seen.at[slot, row, pl.ds(tile * TILE, TILE)]
        plgpu.copy_gmem_to_smem(keep, shared["mask"].at[stage], shared["keys_arrived"].at[stage])

    def counts(tile, stage, shape):
        mask = plgpu.load(shared["mask"].at[stage], layout=_LAYOUT.reduce(1)) == 0
        return lax.broadcast_in_dim(mask, shape, [0])

    def whole(tile):
        return shared["pages"][1, tile * per_tile] != 0

    _attend(q, used[slot, row], fetch, counts, whole, out, most, total, scale, splits, shared)


def _dense(q, k, v, entries, out, most, total, *, scale, splits, share, page_size, **shared):
    """The kernel over the first entries of a slot. The last tile of a cache steps back over the one before."""
    slot, row = lax.axis_index("slot"), lax.axis_index("row")
    held, last = entries[slot], k.shape[2] - TILE

    def fetch(tile, stage):
        begin = jnp.minimum(tile * TILE, last)
        for source, name in ((k, "keys"), (v, "values")):
            plgpu.copy_gmem_to_smem(
                source.at[slot, row // share, pl.ds(begin, TILE)],
                shared[name].at[stage],
                shared[f"{name}_arrived"].at[stage],
            )

    def counts(tile, stage, shape):
        places = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT) + jnp.minimum(tile * TILE, last)
        return (places >= tile * TILE) & (places < held)

    def whole(tile):
        return (tile + 1) * TILE <= held

    _attend(q, pl.cdiv(held, TILE), fetch, counts, whole, out, most, total, scale, splits, shared)


def _attend(q, used, fetch, counts, whole, out, most, total, scale, splits, shared):
    """One split of one row: an online softmax over its tiles, `STAGES` of which are on their way at a time.

    Args:
        fetch: starts the copies of a tile into a stage.
        counts: which entries of a tile that has arrived count, in the shape that it is given.
        whole: whether all of a tile do.
    """
    slot, row, split = (lax.axis_index(name) for name in ("slot", "row", "split"))
    (head_dim, columns), dtype = shared["sums"].shape, shared["values"].dtype
    plgpu.copy_gmem_to_smem(q.at[slot, row], shared["queries"], shared["once"])
    plgpu.barrier_wait(shared["once"])
    each = pl.cdiv(used, splits)
    first = split * each
    count = jnp.maximum(jnp.minimum(used - first, each), 0)
    for stage in range(STAGES):

        @pl.when(stage < count)
        def _(stage=stage):
            fetch(first + stage, stage)

    def body(index, carry):
        maximum, denominator, weighted = carry
        tile, stage = first + index, lax.rem(index, STAGES)
        plgpu.barrier_wait(shared["keys_arrived"].at[stage])

        def products(scores):
            plgpu.wgmma(scores, shared["keys"].at[stage], shared["queries"].transpose((1, 0)))
            return scores[...]

        scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((TILE, columns), jnp.float32))
        seen = counts(tile, stage, (TILE, columns))
        scores = jnp.where(seen, scores * scale, MASKED)
        new = jnp.maximum(maximum, jnp.max(scores, axis=0))
        weights = jnp.where(seen, jnp.exp(scores - lax.broadcast_in_dim(new, scores.shape, [1])), 0.0)
        shrink = jnp.exp(maximum - new)
        denominator = denominator * shrink + jnp.sum(weights, axis=0)
        lies = plgpu.layout_cast(weights.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        shared["weights"].transpose((1, 0))[...] = lies
        plgpu.barrier_wait(shared["values_arrived"].at[stage])

        # what no entry holds may be NaN, and 0 * NaN is NaN
        @pl.when(jnp.logical_not(whole(tile)))
        def _():
            values = plgpu.load(shared["values"].at[stage], layout=_LAYOUT)
            zero = jnp.zeros_like(values)
            shared["values"].at[stage][...] = jnp.where(counts(tile, stage, values.shape), values, zero)

        plgpu.commit_smem()

        def mixed(acc):
            plgpu.wgmma(acc, shared["values"].at[stage].transpose((1, 0)), shared["weights"].transpose((1, 0)))
            return acc[...]

        weighted = weighted * lax.broadcast_in_dim(shrink, weighted.shape, [1])
        weighted = weighted + pl.run_scoped(mixed, plgpu.WGMMAAccumulatorRef((head_dim, columns), jnp.float32))
        plgpu.commit_smem()  # all warps have read the stage

        @pl.when(index + STAGES < count)
        def _():
            fetch(tile + STAGES, stage)

        return new, denominator, weighted

    def vector(value):
        return plgpu.layout_cast(jnp.full((columns,), value, jnp.float32), _LAYOUT.reduce(0))

    empty = plgpu.layout_cast(jnp.zeros((head_dim, columns), jnp.float32), _LAYOUT)
    maximum, denominator, weighted = lax.fori_loop(0, count, body, (vector(MASKED), vector(0.0), empty))
    shared["sums"][...] = weighted
    shared["highest"][...] = maximum
    shared["denominator"][...] = denominator
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared["sums"], out.at[slot, row, split])
    plgpu.copy_smem_to_gmem(shared["highest"], most.at[slot, row, split])
    plgpu.copy_smem_to_gmem(shared["denominator"], total.at[slot, row, split])
    plgpu.wait_smem_to_gmem(0)
