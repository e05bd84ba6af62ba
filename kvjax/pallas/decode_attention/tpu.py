"""Attention over the whole of a view on a TPU: blocks of keys stream through VMEM, up to the one of the last entry."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

BLOCK = 1024  # entries in VMEM at a time, twice: 1 MiB of keys and values in bfloat16


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    entries: Int[Array, "B"],
    *,
    scale: float,
) -> Float[Array, "B H D"]:
    """As `reference`.

    Raises:
        NotImplementedError: for heads that fill no lane.
    """
    slots, heads, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    group = heads // kv_heads
    block = min(BLOCK, capacity)
    last = (jnp.maximum(entries, 1) - 1) // block  # of each slot, the last block with an entry

    def part(slot, head, index, _, last):
        return slot, head, jnp.minimum(index, last[slot]), 0  # a block that was there already is not fetched again

    def row(slot, head, *_):
        return slot, head, 0, 0

    lane = pltpu.VMEM((group, 1), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, kv_heads, pl.cdiv(capacity, block)),
            in_specs=[
                pl.BlockSpec((1, 1, group, head_dim), row),
                pl.BlockSpec((1, 1, block, head_dim), part),
                pl.BlockSpec((1, 1, block, head_dim), part),
            ],
            out_specs=pl.BlockSpec((1, 1, group, head_dim), row),
            scratch_shapes=[lane, lane, pltpu.VMEM((group, head_dim), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((slots, kv_heads, group, head_dim), q.dtype),
        name="decode_attention",
    )(entries.astype(jnp.int32), last.astype(jnp.int32), q.reshape(slots, kv_heads, group, head_dim), k, v)
    return out.reshape(q.shape)


def _kernel(entries, last, q_ref, k_ref, v_ref, out, maximum, total, acc, *, scale):
    slot, index = pl.program_id(0), pl.program_id(2)
    block = k_ref.shape[2]

    @pl.when(index == 0)
    def _():
        maximum[...] = jnp.full_like(maximum, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(index <= last[slot])
    def _():
        q, keys, values = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0]
        scores = jax.lax.dot_general(q, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale
        seen = index * block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < entries[slot]
        scores = jnp.where(seen, scores, MASKED)
        new = jnp.maximum(maximum[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new), 0)
        # what no entry holds may be NaN, and 0 * NaN is NaN
        inside = index * block + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) < entries[slot]
        values = jnp.where(inside, values, 0)
        part = jax.lax.dot_general(
            weights.astype(values.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        shrink = jnp.exp(maximum[...] - new)
        maximum[...] = new
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc[...] = acc[...] * shrink + part

    @pl.when(index == pl.num_programs(2) - 1)
    def _():
        out[0, 0] = (acc[...] / jnp.maximum(total[...], 1e-30)).astype(out.dtype)
