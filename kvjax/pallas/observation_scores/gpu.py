"""Attention received on a Hopper GPU: the keys are read twice, first for the sums of the softmax, by tensor cores.

As in `hopper`, keys are the rows of a product and queries its columns; blocks of threads share the sequence. A tile is
64 keys by at most 64 queries, which leaves registers for what each query has seen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED
from kvjax.pallas import hopper
from kvjax.pallas.hopper import COLUMNS, MULTIPROCESSORS, STAGES, TILE, TILED

WIDEST = 64  # queries of a product
QUERIES = 128 * 1024  # bytes in shared memory, beside 48 KiB of keys at head dim 128
_LAYOUT = plgpu.Layout.WGMMA


def attention_received(
    queries: Float[Array, "W H D"],
    k: Float[Array, "K T D"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    *,
    scale: float,
    per_head: bool,
) -> Float[Array, "R T"]:
    """As `observation.attention_received`, and from `length` on anything; tiles that begin there are not read.

    Raises:
        NotImplementedError: for other types than 16-bit floats, and for more queries than shared memory has room for.
    """
    heads, head_dim = queries.shape[1:]
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    k = jnp.pad(k, ((0, 0), (0, max(TILE - tokens, 0)), (0, 0)))  # a short prompt fills a tile
    # older queries, which do not count, so that those of a head fill whole columns
    queries = jnp.pad(queries, ((-len(queries) % COLUMNS, 0), (0, 0), (0, 0)))
    window = len(queries)
    grouped = queries.reshape(window, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    hopper.check(grouped.reshape(1, kv_heads, -1, head_dim), k[None])
    share = 1 if per_head else group  # query heads of a row
    together = share * window
    if together * head_dim * 2 > QUERIES:
        raise NotImplementedError(f"{together} queries of a row: more than {QUERIES // (2 * head_dim)} do not fit")
    columns = max(width for width in range(COLUMNS, WIDEST + 1, COLUMNS) if together % width == 0)
    counts = jnp.arange(window) >= window - observed
    # in the order of the columns: where each query is query_positions from; before all keys where it does not count
    asking = jnp.tile(jnp.where(counts, length - window + jnp.arange(window), -1), share)
    asking = asking.astype(jnp.float32).reshape(-1, columns)
    rows = jnp.where(counts[:, None], grouped, 0).reshape(heads // share, -1, columns, head_dim)
    sums = functools.partial(_call, rows, k, asking, length, share=heads // share // kv_heads, scale=scale)
    most, total = sums()
    highest = jnp.max(most, axis=2, keepdims=True)
    total = jnp.sum(total * jnp.exp(most - highest), axis=2)
    # where a query has seen nothing, nothing is left of any weight
    logarithm = jnp.where(total > 0, highest[:, :, 0] + jnp.log(total), -MASKED)
    [out] = sums(logarithm)
    return out[:, :tokens]


def _call(rows, k, asking, length, logarithm=None, *, share, scale) -> Any:
    """Maximum and sum of each query and split of the keys, or with the logarithms of all sums the sums of weights."""
    count, chunks, columns, head_dim = rows.shape
    tokens = k.shape[1]
    first = logarithm is None
    grid = (count, chunks if first else 1)
    splits = max(1, min(-(-2 * MULTIPROCESSORS // (grid[0] * grid[1])), -(-tokens // TILE) // STAGES))
    held = 1 if first else chunks  # products of a tile
    scratch = {
        "queries": plgpu.SMEM((held, columns, head_dim), k.dtype, transforms=TILED),
        "keys": plgpu.SMEM((STAGES, TILE, head_dim), k.dtype, transforms=TILED),
        "query_positions": plgpu.SMEM((held, columns), jnp.float32),
        "once": plgpu.Barrier(num_arrivals=2 if first else held + 2),
        "arrived": plgpu.Barrier(num_barriers=STAGES),
    }
    if first:
        body, inputs = _sum, ()
        out = (jax.ShapeDtypeStruct((count, chunks, splits, columns), jnp.float32),) * 2
        scratch |= {name: plgpu.SMEM((columns,), jnp.float32) for name in ("highest", "denominator")}
    else:
        body, inputs = _weigh, (logarithm,)
        out = (jax.ShapeDtypeStruct((count, tokens), jnp.float32),)
        scratch |= {"sums": plgpu.SMEM((held, columns), jnp.float32), "result": plgpu.SMEM((TILE,), jnp.float32)}
    return plgpu.kernel(
        functools.partial(body, share=share, splits=splits, scale=scale),
        out_type=out,
        scratch_types=scratch,
        grid=(*grid, splits),
        grid_names=("row", "chunk", "split"),
    )(rows, k, asking, jnp.reshape(length, 1).astype(jnp.int32), *inputs)


def _tiles(k, length, *, share, splits, keys, arrived):
    """The tiles of one split: how many, where each begins, and what starts the copy of one into a stage.

    The last tile of the keys steps back over the one before.
    """
    row, split = lax.axis_index("row"), lax.axis_index("split")
    used = pl.cdiv(length[0], TILE)
    each = pl.cdiv(used, splits)
    count = jnp.maximum(jnp.minimum(used - split * each, each), 0)

    def fresh(index):  # the first key of a tile that no tile before it has
        return (split * each + index) * TILE

    def begin(index):
        return jnp.minimum(fresh(index), k.shape[1] - TILE)

    def fetch(index, stage):
        source = k.at[row // share, pl.ds(begin(index), TILE)]
        plgpu.copy_gmem_to_smem(source, keys.at[stage], arrived.at[stage])

    for stage in range(STAGES):

        @pl.when(stage < count)
        def _(stage=stage):
            fetch(stage, stage)

    return count, fresh, begin, fetch


def _logits(keys, queries, asking, begin, fresh, scale):
    """Those of a tile, and which count. A key that no query may see can be NaN, and is not let through."""
    shape = (keys.shape[0], queries.shape[0])

    def products(acc):
        plgpu.wgmma(acc, keys, queries.transpose((1, 0)))
        return acc[...]

    logits = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    places = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT) + begin
    query_positions = lax.broadcast_in_dim(plgpu.load(asking, layout=_LAYOUT.reduce(0)), shape, [1])
    seen = (places >= fresh) & (places.astype(jnp.float32) <= query_positions)
    return jnp.where(seen, logits * scale, MASKED), seen


def _sum(q, k, asking, length, most, total, *, share, splits, scale, **shared):
    """The first pass: an online softmax's maximum and sum of one chunk of queries over one split of the keys."""
    row, chunk, split = (lax.axis_index(name) for name in ("row", "chunk", "split"))
    plgpu.copy_gmem_to_smem(q.at[row, chunk], shared["queries"].at[0], shared["once"])
    plgpu.copy_gmem_to_smem(asking.at[chunk], shared["query_positions"].at[0], shared["once"])
    buffers = {name: shared[name] for name in ("keys", "arrived")}
    count, fresh, begin, fetch = _tiles(k, length, share=share, splits=splits, **buffers)
    plgpu.barrier_wait(shared["once"])

    def body(index, carry):
        maximum, denominator = carry
        stage = lax.rem(index, STAGES)
        plgpu.barrier_wait(shared["arrived"].at[stage])
        tile = shared["keys"].at[stage]
        scores, seen = _logits(
            tile, shared["queries"].at[0], shared["query_positions"].at[0], begin(index), fresh(index), scale
        )
        new = jnp.maximum(maximum, jnp.max(scores, axis=0))
        weights = jnp.where(seen, jnp.exp(scores - lax.broadcast_in_dim(new, scores.shape, [1])), 0.0)
        denominator = denominator * jnp.exp(maximum - new) + jnp.sum(weights, axis=0)
        plgpu.commit_smem()  # all warps have read the stage

        @pl.when(index + STAGES < count)
        def _():
            fetch(index + STAGES, stage)

        return new, denominator

    def vector(value):
        return plgpu.layout_cast(jnp.full(shared["highest"].shape, value, jnp.float32), _LAYOUT.reduce(0))

    maximum, denominator = lax.fori_loop(0, count, body, (vector(MASKED), vector(0.0)))
    shared["highest"][...] = maximum
    shared["denominator"][...] = denominator
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared["highest"], most.at[row, chunk, split])
    plgpu.copy_smem_to_gmem(shared["denominator"], total.at[row, chunk, split])
    plgpu.wait_smem_to_gmem(0)


def _weigh(q, k, asking, length, logarithm, out, *, share, splits, scale, **shared):
    """The second pass: for each key of one split the weights of all queries of a row, summed."""
    row = lax.axis_index("row")
    for chunk in range(shared["queries"].shape[0]):
        plgpu.copy_gmem_to_smem(q.at[row, chunk], shared["queries"].at[chunk], shared["once"])
    plgpu.copy_gmem_to_smem(asking, shared["query_positions"], shared["once"])
    plgpu.copy_gmem_to_smem(logarithm.at[row], shared["sums"], shared["once"])
    buffers = {name: shared[name] for name in ("keys", "arrived")}
    count, _fresh, begin, fetch = _tiles(k, length, share=share, splits=splits, **buffers)
    plgpu.barrier_wait(shared["once"])

    @pl.loop(0, count)
    def _(index):
        stage = lax.rem(index, STAGES)
        plgpu.barrier_wait(shared["arrived"].at[stage])

        def add(chunk, received):
            tile, queries, query_positions = (
                shared["keys"].at[stage],
                shared["queries"].at[chunk],
                shared["query_positions"].at[chunk],
            )
            # keys of the tile before count again, so that all of its places are written alike
            scores, seen = _logits(tile, queries, query_positions, begin(index), 0, scale)
            total = plgpu.load(shared["sums"].at[chunk], layout=_LAYOUT.reduce(0))
            weights = jnp.exp(scores - lax.broadcast_in_dim(total, scores.shape, [1]))
            return received + jnp.sum(jnp.where(seen, weights, 0.0), axis=1)

        none = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), _LAYOUT.reduce(1))
        received = lax.fori_loop(0, shared["queries"].shape[0], add, none)
        plgpu.wait_smem_to_gmem(0)  # the former result has left
        shared["result"][...] = received
        plgpu.commit_smem()  # and all warps have read the stage
        plgpu.copy_smem_to_gmem(shared["result"], out.at[row, pl.ds(begin(index), TILE)])

        @pl.when(index + STAGES < count)
        def _():
            fetch(index + STAGES, stage)

    plgpu.wait_smem_to_gmem(0)
