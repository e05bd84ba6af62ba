"""Attention of a chunk on a Hopper GPU: two warpgroups attend to the tiles of keys that a third one fetches.

JAX's own kernel begins at position 0. That of tokamax takes ranges of keys for each query, but weighs what a tile holds
behind them with zeros, which NaN outlives, and would bring a profiler and a library for quantisation along.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED
from kvjax.pallas import hopper
from kvjax.pallas.hopper import TILED

ROWS = 64  # queries of a warpgroup: the rows of one product
READERS = 2  # warpgroups that attend
BLOCK = READERS * ROWS  # queries that read a tile together, and keys of a tile
ALIGNED = 8  # where a tile may begin: its rows lie in shared memory by eights
STAGES = 2  # tiles in shared memory: 128 KiB of it at head dim 128
WIDEST = 128  # head dim
_LAYOUT = plgpu.Layout.WGMMA
_ROW = _LAYOUT.reduce(1)


def prefill_attention(
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "P H D"]:
    """As `dense.prefill_attention` for a `start` that is a multiple of 8, as that of every whole chunk; NaN for others.

    No key behind the last position of a block of queries is read.

    Raises:
        NotImplementedError: for other types than 16-bit floats, chunks of no whole blocks of queries, and for heads
            that shared memory has no room for.
    """
    chunk, heads, head_dim = q.shape
    kv_heads, tokens, _ = k.shape
    if chunk == tokens and chunk % BLOCK:  # a short prompt, with room for nothing else: it may take some
        extra = -chunk % BLOCK
        q = jnp.pad(q, ((0, extra), (0, 0), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0))) for x in (k, v))
        return prefill_attention(q, k, v, start, scale=scale, window=window)[:chunk]
    hopper.check(q.reshape(1, kv_heads, -1, head_dim), k[None])
    if head_dim > WIDEST:
        raise NotImplementedError(f"head_dim={head_dim}: shared memory has room for the tiles of {WIDEST} dims")
    if chunk % BLOCK:
        raise NotImplementedError(f"a chunk of {chunk} queries is not a whole number of blocks of {BLOCK}")

    def shared(*shape: int) -> Any:
        return plgpu.SMEM((*shape, head_dim), k.dtype, transforms=TILED)

    return plgpu.kernel(
        functools.partial(_kernel, share=heads // kv_heads, scale=scale * math.log2(math.e), window=window),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={
            "queries": shared(READERS, ROWS),
            "keys": shared(STAGES, BLOCK),
            "values": shared(STAGES, BLOCK),
            "weights": plgpu.SMEM((READERS, ROWS, BLOCK), k.dtype, transforms=TILED),
            "queries_arrived": plgpu.Barrier(num_barriers=READERS),
            "keys_arrived": plgpu.Barrier(num_barriers=STAGES),
            "values_arrived": plgpu.Barrier(num_barriers=STAGES),
            "keys_read": plgpu.Barrier(num_arrivals=READERS, num_barriers=STAGES),
            "values_read": plgpu.Barrier(num_arrivals=READERS, num_barriers=STAGES),
        },
        grid=(heads, chunk // BLOCK),
        grid_names=("head", "part"),
        num_threads=READERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, jnp.reshape(start, 1).astype(jnp.int32))


def _kernel(q, k, v, start, out, *, share, scale, window, **shared):
    """One block of queries of one head.

    Its tiles are counted back from its last position, so that none holds a key behind it, and only the last one holds
    keys that come after some of the queries. The first one may step forward over the one after.
    """
    head, part, warpgroup = (lax.axis_index(name) for name in ("head", "part", "warpgroup"))
    end = start[0] + (part + 1) * BLOCK
    first = 0 if window is None else jnp.maximum(end - BLOCK - window + 1, 0)
    count = pl.cdiv(end - first, BLOCK)

    def nominal(tile):
        return end - (count - tile) * BLOCK

    def fetch(tile, stage, name, source):
        rows = pl.ds(pl.multiple_of(jnp.maximum(nominal(tile), 0), ALIGNED), BLOCK)
        plgpu.copy_gmem_to_smem(
            source.at[lax.div(head, share), rows], shared[name].at[stage], shared[f"{name}_arrived"].at[stage]
        )

    @pl.when(warpgroup == READERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for stage in range(STAGES):

            @pl.when(stage < count)
            def _(stage=stage):
                fetch(stage, stage, "keys", k)
                fetch(stage, stage, "values", v)

        @pl.loop(STAGES, count + STAGES)  # to the end: no barrier is left with arrivals that nobody has seen
        def _(tile):
            stage = lax.rem(tile, STAGES)
            for name, source in (("keys", k), ("values", v)):
                plgpu.barrier_wait(shared[f"{name}_read"].at[stage])

                @pl.when(tile < count)
                def _(name=name, source=source):
                    fetch(tile, stage, name, source)

    @pl.when(warpgroup < READERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        row = part * BLOCK + warpgroup * ROWS
        queries, arrived = shared["queries"].at[warpgroup], shared["queries_arrived"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[pl.ds(row, ROWS), head], queries, arrived)
        plgpu.barrier_wait(arrived)

        def visible(tile):
            """Which keys of a tile each query sees."""
            shape, begin = (ROWS, BLOCK), jnp.maximum(nominal(tile), 0)
            query_positions = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_LAYOUT) + (start[0] + row)
            places = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_LAYOUT) + begin
            seen = (places <= query_positions) & (places < nominal(tile) + BLOCK)
            return seen if window is None else seen & (places > query_positions - window)

        _attend(queries, shared["weights"].at[warpgroup], count, nominal, visible, end, scale, window, shared)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, out.at[pl.ds(row, ROWS), head])
        plgpu.wait_smem_to_gmem(0)


def _attend(queries, lies, count, nominal, visible, end, scale, window, shared):
    """What one warpgroup does: an online softmax over the tiles, in powers of two. The output takes the queries' place.

    A row that has seen no key yet gathers what its first visible key multiplies by zero, see `dense.MASKED`. Weights
    go by way of shared memory (`lies`): a product could take them from registers, but not in the interpreter.
    """
    head_dim, dtype = queries.shape[1], shared["values"].dtype

    def body(tile, carry):
        maximum, total, weighted = carry
        stage = lax.rem(tile, STAGES)
        plgpu.barrier_wait(shared["keys_arrived"].at[stage])

        def products(acc):
            plgpu.wgmma(acc, queries, shared["keys"].at[stage].transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, BLOCK), jnp.float32)) * scale
        plgpu.barrier_arrive(shared["keys_read"].at[stage])
        partly = (tile == count - 1) | (nominal(tile) < 0)
        if window is not None:
            partly |= nominal(tile) <= end - 1 - window
        scores = lax.cond(partly, lambda: jnp.where(visible(tile), scores, MASKED), lambda: scores)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new, scores.shape, [0]))
        shrink = jnp.exp2(maximum - new)
        total = total * shrink + jnp.sum(weights, axis=1)
        lies[...] = weights.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(shared["values_arrived"].at[stage])

        def mixed(acc):
            plgpu.wgmma(acc, lies, shared["values"].at[stage])
            return acc[...]

        weighted = weighted * lax.broadcast_in_dim(shrink, weighted.shape, [0])
        weighted = weighted + pl.run_scoped(mixed, plgpu.WGMMAAccumulatorRef((ROWS, head_dim), jnp.float32))
        plgpu.barrier_arrive(shared["values_read"].at[stage])
        return new, total, weighted

    def vector(value):
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), _ROW)

    empty = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), _LAYOUT)
    _, total, weighted = lax.fori_loop(0, count, body, (vector(MASKED), vector(0.0), empty))
    total = total * jnp.where(lax.rem(end, ALIGNED) == 0, 1.0, jnp.nan)  # no wrong answer where no tile could begin
    queries[...] = (weighted / lax.broadcast_in_dim(total, weighted.shape, [0])).astype(dtype)
