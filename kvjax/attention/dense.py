"""Exact attention over a cache, block by block: work and temporaries grow with what is read, not with its room.

Both functions run an online softmax over blocks of keys and stop at the last block that holds a visible key, so
a cache may be allocated far larger than the sequence in it, and no [T, T] array ever exists.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PREFILL_BLOCK = 512
QUERY_TILE = 64  # queries that are attended at once on a CPU
DECODE_BLOCK = 256
# A finite "minus infinity": a row that has seen no key yet must not turn into NaN. What such a row gathers is
# multiplied by exp(MASKED - score) = 0 at its first visible key.
MASKED = -1e30

_Carry = tuple[Array, Array, Array]  # running maximum [*R], running sum [*R], weighted values [*R, D]; float32


def prefill_attention(
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "P H D"]:
    """Attends one chunk of a prompt to all keys up to itself; the chunk's own keys are already in `k`, `v`.

    On a CPU the queries go through in tiles of one size, so that a row has the same bits in a chunk of any size; and
    each tile stops at its own last key.

    Args:
        q: queries of positions `start` to `start + P - 1`, rotated.
        k: keys of positions 0 to T - 1; blocks that begin beyond the chunk are not read.
        scale: multiplies q.k before the softmax.
        window: position p sees keys in (p - window, p]; None sees all.
    """
    attend = functools.partial(_attend_chunk, scale=scale, window=window)
    return jax.lax.platform_dependent(q, k, v, start, cpu=functools.partial(_in_tiles, attend), default=attend)


def _in_tiles(
    attend: Callable[..., Array],
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
) -> Float[Array, "P H D"]:
    chunk, heads, head_dim = q.shape
    if chunk % QUERY_TILE or chunk == QUERY_TILE:
        return attend(q, k, v, start)
    tiles = chunk // QUERY_TILE
    starts = start + QUERY_TILE * jnp.arange(tiles, dtype=start.dtype)
    out = jax.lax.map(
        lambda tile: attend(tile[0], k, v, tile[1]), (q.reshape(tiles, QUERY_TILE, heads, head_dim), starts)
    )
    return out.reshape(q.shape)


def _attend_chunk(
    q: Float[Array, "P H D"],
    k: Float[Array, "K T D"],
    v: Float[Array, "K T D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "P H D"]:
    chunk, heads, head_dim = q.shape
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    block = min(PREFILL_BLOCK, tokens)
    # [K, G*P, D]: the queries of all heads of one kv head are the rows of one matrix product
    rows = q.reshape(chunk, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    rows = rows.reshape(kv_heads, group * chunk, head_dim)
    query_positions = (start + jnp.tile(jnp.arange(chunk), group))[:, None]

    def body(index: Int[Array, ""], carry: _Carry) -> _Carry:
        begin, fresh = _block(index, block, tokens)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, block, axis=1) for x in (k, v))
        visible = fresh & _sees(query_positions, begin + jnp.arange(block), window)
        scores = jnp.einsum("kmd,ktd->kmt", rows, keys, preferred_element_type=jnp.float32) * scale
        weights, carry = _rescale(carry, jnp.where(visible, scores, MASKED))
        # behind the chunk lies what an earlier request has left, and 0 * NaN is NaN
        values = jnp.where((begin + jnp.arange(block) < start + chunk)[:, None], values, 0)
        new = jnp.einsum("kmt,ktd->kmd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return carry[0], carry[1], carry[2] + new

    first = 0 if window is None else jnp.maximum(start - window + 1, 0) // block
    last = (start + chunk + block - 1) // block
    _, total, out = jax.lax.fori_loop(first, last, body, _empty((kv_heads, group * chunk), head_dim))
    out = (out / total[..., None]).reshape(kv_heads, group, chunk, head_dim).transpose(2, 0, 1, 3)
    return out.reshape(chunk, heads, head_dim).astype(q.dtype)


def decode_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    positions: Int[Array, "B K C"],
    query_positions: Int[Array, "B"],
    entries: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B H D"]:
    """Attends one token a slot to the entries of its view; the token's own key is already among them.

    Args:
        positions: the token position each entry was computed at; negative where the view is empty.
        query_positions: the position of the token that attends.
        entries: how many leading entries of a slot may be filled, 0 for a slot that is not decoding (its output
            is meaningless). Blocks beyond them are not read.
        scale: multiplies q.k before the softmax.
        window: as in `prefill_attention`.
    """

    def over(at_once: int) -> Callable[..., Array]:
        return functools.partial(_decode, at_once=at_once, scale=scale, window=window)

    # A CPU takes the slots one by one and reads just what each holds; other devices take them side by side.
    return jax.lax.platform_dependent(
        q, k, v, positions, query_positions, entries, cpu=over(1), default=over(q.shape[0])
    )


def _decode(
    q: Float[Array, "B H D"],
    k: Float[Array, "B K C D"],
    v: Float[Array, "B K C D"],
    positions: Int[Array, "B K C"],
    query_positions: Int[Array, "B"],
    entries: Int[Array, "B"],
    *,
    at_once: int,
    scale: float,
    window: int | None,
) -> Float[Array, "B H D"]:
    slots, heads, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    block = min(DECODE_BLOCK, capacity)
    queries = q.reshape(slots, kv_heads, heads // kv_heads, head_dim)

    def some_slots(index: Int[Array, ""], out: Float[Array, "B K G D"]) -> Float[Array, "B K G D"]:
        slot = index * at_once
        rows, position, held = (
            jax.lax.dynamic_slice_in_dim(x, slot, at_once) for x in (queries, query_positions, entries)
        )

        def body(index: Int[Array, ""], carry: _Carry) -> _Carry:
            begin, fresh = _block(index, block, capacity)
            size = (at_once, kv_heads, block, head_dim)
            keys, values = (jax.lax.dynamic_slice(x, (slot, 0, begin, 0), size) for x in (k, v))
            places = jax.lax.dynamic_slice(positions, (slot, 0, begin), size[:3])
            visible = fresh & (places >= 0) & _sees(position[:, None, None], places, window)
            scores = jnp.einsum("bkgd,bkcd->bkgc", rows, keys, preferred_element_type=jnp.float32) * scale
            weights, carry = _rescale(carry, jnp.where(visible[:, :, None], scores, MASKED))
            weights = weights.astype(v.dtype)
            values = jnp.where((places >= 0)[..., None], values, 0)  # may be an earlier request's; 0 * NaN is NaN
            new = jnp.einsum("bkgc,bkcd->bkgd", weights, values, preferred_element_type=jnp.float32)
            return carry[0], carry[1], carry[2] + new

        last = (jnp.max(held) + block - 1) // block
        _, total, new = jax.lax.fori_loop(0, last, body, _empty(rows.shape[:-1], head_dim))
        # a slot that reads no block has total 0
        new = new / jnp.maximum(total, 1e-30)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(out, new.astype(out.dtype), slot, axis=0)

    out = jax.lax.fori_loop(0, slots // at_once, some_slots, jnp.zeros_like(queries))
    return out.reshape(q.shape)


def _block(index: Int[Array, ""], block: int, tokens: int) -> tuple[Int[Array, ""], Bool[Array, "block"]]:
    """Where block `index` begins, and which of its keys no earlier block held (the last block may step back)."""
    begin = jnp.minimum(index * block, tokens - block)
    return begin, begin + jnp.arange(block) >= index * block


def _sees(query_positions: Int[Array, "*Q"], keys: Int[Array, "*T"], window: int | None) -> Bool[Array, "*R"]:
    causal = keys <= query_positions
    return causal if window is None else causal & (keys > query_positions - window)


def _empty(rows: tuple[int, ...], head_dim: int) -> _Carry:
    return jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, head_dim))


def _rescale(carry: _Carry, scores: Float[Array, "*R block"]) -> tuple[Float[Array, "*R block"], _Carry]:
    """Weights of a block under the new running maximum, and the carry scaled to it (its values not yet added)."""
    maximum, total, out = carry
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    return weights, (new_maximum, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None])
