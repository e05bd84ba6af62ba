"""Page scores on a Hopper GPU: the summaries are read once, by tensor cores; the softmax over what is left is XLA's.

A summary of float8 is widened in registers: a tensor core would want queries of float8 beside it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from kvjax.attention.scores import bounding_queries, group_weights
from kvjax.pallas.hopper import COLUMNS, MULTIPROCESSORS, TILED

TILE = 64  # pages at a time: the rows of one product
STAGES = 3


def page_scores(
    q: Float[Array, "B K G D"],
    bounds: Float[Array, "B K P 2 D"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K P"]:
    """As `reference`; tiles beyond a slot's entries are not read.

    Raises:
        NotImplementedError: for other queries than 16-bit floats, other summaries than theirs or float8, few pages.
    """
    slots, kv_heads, group, head_dim = q.shape
    pages = bounds.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries of {q.dtype}: tensor cores take 16-bit operands")
    if bounds.dtype not in (q.dtype, jnp.float8_e4m3fn):
        raise NotImplementedError(f"a summary of {bounds.dtype}: {q.dtype} and float8_e4m3fn are served")
    if 2 * head_dim % TILE:
        raise NotImplementedError(f"head_dim={head_dim}: twice it is not a multiple of {TILE}")
    if pages < TILE:
        raise NotImplementedError(f"{pages} pages are fewer than the {TILE} that are read at a time")
    columns = -(-group // COLUMNS) * COLUMNS
    queries = jnp.pad(
        bounding_queries(q).reshape(slots, kv_heads, group, -1), ((0, 0), (0, 0), (0, columns - group), (0, 0))
    )
    splits = max(1, min(-(-2 * MULTIPROCESSORS // (slots * kv_heads)), -(-pages // TILE) // STAGES))
    narrow = bounds.dtype != q.dtype
    tile = (TILE, 2 * head_dim)
    scratch = {
        "queries": plgpu.SMEM((columns, 2 * head_dim), q.dtype, transforms=TILED),
        "tiles": plgpu.SMEM((STAGES, *tile), bounds.dtype, transforms=() if narrow else TILED),
        "result": plgpu.SMEM((TILE, columns), jnp.float32),
        "once": plgpu.Barrier(),
        "arrived": plgpu.Barrier(num_barriers=STAGES),
    }
    if narrow:
        scratch["wide"] = plgpu.SMEM(tile, q.dtype, transforms=TILED)
    logits = plgpu.kernel(
        functools.partial(_kernel, page_size=page_size, splits=splits),
        out_type=jax.ShapeDtypeStruct((slots, kv_heads, pages, columns), jnp.float32),
        scratch_types=scratch,
        grid=(slots, kv_heads, splits),
        grid_names=("slot", "head", "split"),
    )(queries, bounds.reshape(slots, kv_heads, pages, -1), entries.astype(jnp.int32))
    counts = jnp.clip(entries[:, None] - jnp.arange(pages) * page_size, 0, page_size)
    counts = jnp.broadcast_to(counts[:, None], (slots, kv_heads, pages))
    temperature = jnp.full((slots, kv_heads, group), 1 / scale)
    return group_weights(logits[..., :group].swapaxes(2, 3), temperature, counts)


def _kernel(q, bounds, entries, out, *, page_size, splits, **shared):
    """Logits of the pages of one split; those of pages without an entry may be anything."""
    slot, head, split = (lax.axis_index(name) for name in ("slot", "head", "split"))
    pages, (rows, columns) = bounds.shape[2], shared["result"].shape
    used = pl.cdiv(pl.cdiv(entries[slot], page_size), rows)
    each = pl.cdiv(used, splits)
    first = split * each
    count = jnp.maximum(jnp.minimum(used - first, each), 0)
    plgpu.copy_gmem_to_smem(q.at[slot, head], shared["queries"], shared["once"])
    plgpu.barrier_wait(shared["once"])

    def place(index):  # the last tile steps back over the one before, and computes the same again
        return pl.ds(jnp.minimum((first + index) * rows, pages - rows), rows)

    def fetch(index, stage):
        source = bounds.at[slot, head, place(index)]
        plgpu.copy_gmem_to_smem(source, shared["tiles"].at[stage], shared["arrived"].at[stage])

    for stage in range(STAGES):

        @pl.when(stage < count)
        def _(stage=stage):
            fetch(stage, stage)

    @pl.loop(0, count)
    def _(index):
        stage = lax.rem(index, STAGES)
        plgpu.barrier_wait(shared["arrived"].at[stage])
        tile = shared["tiles"].at[stage]
        if "wide" in shared:
            wide = plgpu.load(tile).astype(jnp.float16).astype(jnp.float32)
            shared["wide"][...] = wide.astype(shared["wide"].dtype)
            plgpu.commit_smem()
            tile = shared["wide"]

        def products(acc):
            plgpu.wgmma(acc, tile, shared["queries"].transpose((1, 0)))
            return acc[...]

        logits = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32))
        plgpu.wait_smem_to_gmem(0)  # the former result has left
        shared["result"][...] = logits
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared["result"], out.at[slot, head, place(index)])

        @pl.when(index + STAGES < count)
        def _():
            fetch(index + STAGES, stage)

    plgpu.wait_smem_to_gmem(0)
