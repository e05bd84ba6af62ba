"""Attention received on a TPU: the keys of a kv head stream through VMEM twice, once for the softmax's sum.

No logit leaves VMEM: the second pass computes again what the first has summed, which costs less than a matrix of the
window's queries by the prompt's keys would, written and read.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED

BLOCK = 1024  # keys in VMEM at a time, twice
LOGITS = 1 << 19  # of a block at most, 2 MiB: with more queries there are fewer keys
ROWS = 4096  # queries of a kv head, for which 128 keys are left
SUBLANES = 8


def attention_received(
    queries: Float[Array, "W H D"],
    k: Float[Array, "K T D"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    *,
    scale: float,
    per_head: bool,
) -> Float[Array, "R T"]:
    """As `observation.attention_received`, and from `length` on anything; blocks that begin there are not read.

    Raises:
        NotImplementedError: for heads that fill no lane, and for more queries than VMEM has room for.
    """
    heads, head_dim = queries.shape[1:]
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    if head_dim % 128:
        raise NotImplementedError(f"head_dim={head_dim}: a key fills lanes of 128 only in part and would be copied")
    # older queries, which do not count, so that those of a head fill whole sublanes
    queries = jnp.pad(queries, ((-len(queries) % SUBLANES, 0), (0, 0), (0, 0)))
    window = len(queries)
    rows = group * window
    if rows > ROWS:
        raise NotImplementedError(f"{rows} queries of a kv head: logits of more than {ROWS} do not fit into VMEM")
    block = min(BLOCK, LOGITS // rows // 128 * 128, tokens)
    last = (length - 1) // block  # the last block with a token
    summed = group if per_head else 1

    def all_queries(head, *_):
        return head, 0, 0

    def part(head, _, index, numbers):  # a block that was there already is not fetched again
        return head, jnp.minimum(index, numbers[2]), 0

    def written(head, again, index, numbers):  # the first pass writes nothing, so its block stays for the second
        return head, 0, again * jnp.minimum(index, numbers[2])

    column = pltpu.VMEM((rows, 1), jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, window=window, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(kv_heads, 2, pl.cdiv(tokens, block)),
            in_specs=[pl.BlockSpec((1, rows, head_dim), all_queries), pl.BlockSpec((1, block, head_dim), part)],
            out_specs=pl.BlockSpec((1, summed, block), written),
            scratch_shapes=[column, column],
        ),
        out_shape=jax.ShapeDtypeStruct((kv_heads, summed, tokens), jnp.float32),
        name="observation_scores",
    )(
        jnp.stack([length, observed, last]).astype(jnp.int32),
        queries.reshape(window, kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, rows, head_dim),
        k,
    )
    return out.reshape(-1, tokens)


def _kernel(numbers, q_ref, k_ref, out, maximum, total, *, window, scale):
    again, index = pl.program_id(1), pl.program_id(2)
    length, observed, last = numbers[0], numbers[1], numbers[2]
    rows, block = q_ref.shape[1], k_ref.shape[1]

    def logits():
        """Those of a block, and which of its keys each query sees; a query that does not count sees none."""
        products = jax.lax.dot_general(q_ref[0], k_ref[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        order = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0), window)
        query_positions = jnp.where(order >= window - observed, length - window + order, -1)
        seen = index * block + jax.lax.broadcasted_iota(jnp.int32, products.shape, 1) <= query_positions
        return jnp.where(seen, products * scale, MASKED), seen

    @pl.when((again == 0) & (index == 0))
    def _():
        maximum[...] = jnp.full_like(maximum, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when((again == 0) & (index <= last))
    def _():
        scores, seen = logits()
        new = jnp.maximum(maximum[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new), 0)
        total[...] = total[...] * jnp.exp(maximum[...] - new) + jnp.sum(weights, axis=1, keepdims=True)
        maximum[...] = new

    @pl.when((again == 1) & (index <= last))
    def _():
        scores, seen = logits()
        weights = jnp.where(seen, jnp.exp(scores - maximum[...]), 0) / jnp.maximum(total[...], 1e-30)
        out[0] = jnp.sum(weights.reshape(out.shape[1], -1, block), axis=1)
