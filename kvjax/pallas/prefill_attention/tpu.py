"""Attention of a chunk on a TPU: blocks of keys stream through VMEM past a block of queries, up to its last position.

JAX's own kernels do not serve: splash and flash attention want their masks when they are compiled, or as an array of
queries by keys, and ragged paged attention wants the K and V of a token side by side. A chunk begins anywhere here, and
keys of a kv head lie one behind the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

KEYS = 1024  # of a block, in VMEM twice
QUERIES = 512  # of a block at most: their logits with a block of keys are 2 MiB
ROWS = 2048  # queries of all heads of a group in a block
SUBLANES = 16  # of 16-bit numbers


def prefill_attention(
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "P H D"]:
    """As `dense.prefill_attention`; the grid ends with the chunk, so that room behind it costs nothing.

    Raises:
        NotImplementedError: for heads that fill no lane, and for groups whose queries VMEM has no room for.
    """
    chunk, heads, head_dim = q.shape
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    if group * SUBLANES > ROWS:
        raise NotImplementedError(f"{group} query heads of a kv head: VMEM has room for {ROWS // SUBLANES}")
    queries = min(QUERIES, ROWS // group // SUBLANES * SUBLANES, chunk)
    block = min(KEYS, tokens)
    # of each block of queries the first and the last block of keys that any of them sees
    begin = start + jnp.arange(pl.cdiv(chunk, queries)) * queries
    last = (jnp.minimum(begin + queries, start + chunk) - 1) // block
    first = jnp.zeros_like(last) if window is None else jnp.maximum(begin - window + 1, 0) // block
    steps = jnp.max(last - first) + 1

    # the heads of a group lie side by side, as a projection leaves them: nothing is transposed before or after
    def query_block(head, part, *_):
        return part, head

    def seen(head, part, index, _, first, last):  # a block that was there already is not fetched again
        return head, jnp.minimum(first[part] + index, last[part]), 0

    def rows(*shape: int) -> Any:
        return pltpu.VMEM(shape, jnp.float32)

    out = pl.pallas_call(
        functools.partial(_kernel, group=group, chunk=chunk, scale=scale, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(kv_heads, len(begin), steps),
            in_specs=[
                pl.BlockSpec((queries, group * head_dim), query_block),
                pl.BlockSpec((1, block, head_dim), seen),
                pl.BlockSpec((1, block, head_dim), seen),
            ],
            out_specs=pl.BlockSpec((queries, group * head_dim), query_block),
            scratch_shapes=[rows(group, queries, 1), rows(group, queries, 1), rows(group, queries, head_dim)],
        ),
        out_shape=jax.ShapeDtypeStruct((chunk, heads * head_dim), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="prefill_attention",
    )(
        jnp.reshape(start, 1).astype(jnp.int32),
        first.astype(jnp.int32),
        last.astype(jnp.int32),
        q.reshape(chunk, heads * head_dim),
        k,
        v,
    )
    return out.reshape(q.shape)


def _kernel(start, first, last, q_ref, k_ref, v_ref, out, maximum, total, acc, *, group, chunk, scale, window):
    part, index = pl.program_id(1), pl.program_id(2)
    (queries, _), (_, block, head_dim) = q_ref.shape, k_ref.shape
    first_query = start[0] + part * queries  # its position
    begin = (first[part] + index) * block

    @pl.when(index == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def attend(masked):
        keys, values = k_ref[0], v_ref[0]
        if masked:
            # behind the chunk lies anything, and 0 * NaN is NaN
            inside = begin + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < start[0] + chunk
            values = jnp.where(inside, values, 0)
            # how far a key lies behind a query
            behind = first_query - begin + jax.lax.broadcasted_iota(jnp.int32, (queries, block), 0)
            behind = behind - jax.lax.broadcasted_iota(jnp.int32, (queries, block), 1)
            visible = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        for head in range(group):
            q = q_ref[:, head * head_dim : (head + 1) * head_dim]
            scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
            if masked:
                scores = jnp.where(visible, scores, MASKED)
            new = jnp.maximum(maximum[head], jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - new)  # of a row without a key yet they are gone at its first, see `MASKED`
            mixed = jax.lax.dot_general(
                weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            shrink = jnp.exp(maximum[head] - new)
            maximum[head] = new
            total[head] = total[head] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            acc[head] = acc[head] * shrink + mixed

    whole = begin + block - 1 <= first_query  # every query sees every key
    if window is not None:
        whole &= begin > first_query + queries - 1 - window

    @pl.when((first[part] + index <= last[part]) & whole)
    def _():
        attend(masked=False)

    @pl.when((first[part] + index <= last[part]) & jnp.logical_not(whole))
    def _():
        attend(masked=True)

    @pl.when(index == pl.num_programs(2) - 1)
    def _():
        for head in range(group):
            lanes = slice(head * head_dim, (head + 1) * head_dim)
            out[:, lanes] = (acc[head] / jnp.maximum(total[head], 1e-30)).astype(out.dtype)
