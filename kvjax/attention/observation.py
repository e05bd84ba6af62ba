"""Observation scores (SnapKV, RocketKV): the attention that each token of a prompt receives from its last queries.

The queries are kept in a ring while the prompt comes in chunks; the scores are computed once, after the last chunk,
block by block over the keys, so that no array has the prompt's length twice.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.dense import MASKED

BLOCK = 512


def observe(
    ring: Float[Array, "W H D"], q: Float[Array, "P H D"], start: Int[Array, ""], length: Int[Array, ""]
) -> Float[Array, "W H D"]:
    """Enters a chunk's queries into the ring of the last W: position p lies in row p mod W.

    Args:
        q: queries of positions `start` to `start + P - 1`, rotated.
        length: of the prompt; queries behind it are padding and do not enter.
    """
    window, chunk = ring.shape[0], q.shape[0]
    last = jnp.minimum(start + chunk, length) - 1
    newest = last - (last - jnp.arange(window)) % window  # the newest position of each row
    rows = jnp.take(q, jnp.clip(newest - start, 0, chunk - 1), axis=0).astype(ring.dtype)
    return jnp.where((newest >= start)[:, None, None], rows, ring)


def last_queries(ring: Float[Array, "W H D"], length: Int[Array, ""]) -> Float[Array, "W H D"]:
    """The ring's queries in order: row i is position `length - W + i`, meaningless where that is negative."""
    window = ring.shape[0]
    return jnp.take(ring, (length + jnp.arange(window)) % window, axis=0)


def prompt_queries(q: Float[Array, "T H D"], length: Int[Array, ""], window: int) -> Float[Array, "W H D"]:
    """`last_queries` of a prompt whose queries are there as a whole; what is behind `length` is padding."""
    return jnp.take(q, jnp.maximum(length - window + jnp.arange(window), 0), axis=0)


def attention_received(
    queries: Float[Array, "W H D"],
    k: Float[Array, "K T D"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    *,
    scale: float,
    per_head: bool = False,
) -> Float[Array, "R T"]:
    """The attention weight each token gets from the window's queries, summed over them and over the heads of a group.

    The softmax is over all keys a query sees, in float32. Two passes over the keys: the first finds each query's
    maximum and denominator, the second sums its weights; blocks that begin beyond `length` are not read.

    Args:
        queries: of positions `length - W` to `length - 1`, rotated (`last_queries`).
        k: keys of positions 0 to T - 1; what lies behind `length` may be anything.
        observed: only the last so many queries count; 1 to min(W, length).
        scale: multiplies q.k before the softmax.
        per_head: a row for each query head instead of their sum for each kv head.

    Returns:
        [K T], or [H T] for `per_head`. Zero from `length` on.
    """
    window, heads, head_dim = queries.shape
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    block = min(BLOCK, tokens)
    # [K, G*W, D]: the queries of all heads of one kv head are the rows of one matrix product
    rows = queries.reshape(window, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, group * window, head_dim)
    order = jnp.arange(window)
    counts = jnp.tile(order >= window - observed, group)[:, None]
    query_positions = jnp.tile(length - window + order, group)[:, None]

    def scores(index: Int[Array, ""]) -> tuple[Int[Array, ""], Bool[Array, "block"], Float[Array, "K M block"]]:
        begin = jnp.minimum(index * block, tokens - block)  # the last block steps back over the one before
        places = begin + jnp.arange(block)
        keys = jax.lax.dynamic_slice_in_dim(k, begin, block, axis=1)
        logits = jnp.einsum("kmd,ktd->kmt", rows, keys, preferred_element_type=jnp.float32) * scale
        return begin, places >= index * block, jnp.where(counts & (places <= query_positions), logits, MASKED)

    def total(index: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        _, fresh, logits = scores(index)
        logits = jnp.where(fresh, logits, MASKED)
        maximum = jnp.maximum(carry[0], jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - maximum[..., None])
        return maximum, carry[1] * jnp.exp(carry[0] - maximum) + jnp.sum(weights, axis=-1)

    blocks = (length + block - 1) // block
    shape = (kv_heads, group * window)
    maximum, denominator = jax.lax.fori_loop(0, blocks, total, (jnp.full(shape, MASKED), jnp.zeros(shape)))
    # a query that does not count has seen nothing but masked keys, whose weights would all be 1
    share = jnp.where(counts[:, 0], 1 / denominator, 0)

    def add(index: Int[Array, ""], out: Float[Array, "K N T"]) -> Float[Array, "K N T"]:
        begin, _, logits = scores(index)
        weights = jnp.exp(logits - maximum[..., None]) * share[..., None]
        weights = jnp.sum(weights.reshape(kv_heads, out.shape[1], -1, block), axis=2)
        return jax.lax.dynamic_update_slice_in_dim(out, weights, begin, axis=2)

    out = jnp.zeros((kv_heads, group if per_head else 1, tokens))
    return jax.lax.fori_loop(0, blocks, add, out).reshape(-1, tokens)


def max_pool(scores: Float[Array, "R T"], kernel: int, end: Int[Array, ""]) -> Float[Array, "R T"]:
    """The largest score within `kernel // 2` places to either side, among the places before `end`.

    Raises:
        ValueError: for a kernel that is not odd.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: a pooling kernel has a middle, so it is an odd number from 1 on")
    scores = jnp.where(jnp.arange(scores.shape[1]) < end, scores, -jnp.inf)
    scores = jnp.pad(scores, ((0, 0), (kernel // 2, kernel // 2)), constant_values=-jnp.inf)
    reached = 1
    while reached < kernel:  # each row twice as wide as before; a windowed reduction takes a TPU's compiler very long
        step = min(reached, kernel - reached)
        scores = jnp.maximum(scores[:, :-step], scores[:, step:])
        reached += step
    return scores
