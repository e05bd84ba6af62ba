"""Dense causal attention over whole sequences, for training and for comparing models; nothing is cached.

Queries go through in blocks that see only the keys before their own end, so half of T * T is never computed;
a block's scores are computed again in the backward pass, so memory grows with T * block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.layers import Attend

_BLOCK = 256
# blocks are written out one by one, since each has its own number of keys: so many bodies a layer at most
_BLOCKS = 16


def visible(queries: Int[Array, "T"], keys: Int[Array, "S"], window: int | None) -> Bool[Array, "T S"]:
    """Which key positions each query position sees."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def causal_attention(config: DecoderConfig, layer: LayerConfig, block: int = _BLOCK) -> Attend:
    """An `attend` for [*B T] where the last batch axis is the sequence, from position 0."""

    def rows(
        q: Float[Array, "*B K G R D"],
        k: Float[Array, "*B K S D"],
        v: Float[Array, "*B K S D"],
        seen: Bool[Array, "R S"],
    ) -> Float[Array, "*B K G R D"]:
        # a group's queries as rows of one matrix: the keys of its head are read once, and nothing is repeated
        flat = q.reshape(*q.shape[:-3], -1, q.shape[-1])
        scores = jnp.einsum("...qd,...sd->...qs", flat, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores.reshape(*q.shape[:-1], -1), -jnp.inf).reshape(scores.shape)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        mixed = jnp.einsum("...qs,...sd->...qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / weights.sum(axis=-1, keepdims=True)).astype(q.dtype).reshape(q.shape)

    def attend(
        q: Float[Array, "*B T H D"], k: Float[Array, "*B T K D"], v: Float[Array, "*B T K D"]
    ) -> Float[Array, "*B T H D"]:
        length = q.shape[-3]
        size = max(block, -(-length // _BLOCKS))
        grouped = q.reshape(*q.shape[:-2], config.num_kv_heads, config.group_size, config.head_dim)
        grouped = jnp.moveaxis(grouped * config.query_scale, -4, -2)
        keys, values = jnp.moveaxis(k, -3, -2), jnp.moveaxis(v, -3, -2)
        mixed = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            first = 0 if layer.window is None else max(0, start - layer.window + 1)
            seen = visible(jnp.arange(start, stop), jnp.arange(first, stop), layer.window)
            here = keys[..., first:stop, :], values[..., first:stop, :]
            mixed.append(jax.checkpoint(rows)(grouped[..., start:stop, :], *here, seen))
        return jnp.moveaxis(jnp.concatenate(mixed, axis=-2), -2, -4).reshape(q.shape)

    return attend
