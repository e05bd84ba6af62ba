"""Dense causal attention over whole sequences, for training and for comparing models; nothing is cached.

Queries go through in blocks and a block's scores are computed again in the backward pass, so memory grows
with T * block, not with T * T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.layers import Attend

_BLOCK = 512


def visible(queries: Int[Array, "T"], keys: Int[Array, "S"], window: int | None) -> Bool[Array, "T S"]:
    """Which key positions each query position sees."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def causal(config: DecoderConfig, layer: LayerConfig, block: int = _BLOCK) -> Attend:
    """An `attend` for [*B T] where the last batch axis is the sequence, from position 0."""

    def attend(
        q: Float[Array, "*B T H D"], k: Float[Array, "*B T K D"], v: Float[Array, "*B T K D"]
    ) -> Float[Array, "*B T H D"]:
        length = q.shape[-3]
        keys = jnp.arange(length)

        @jax.checkpoint
        def rows(q: Float[Array, "*B R H D"], start: Int[Array, ""]) -> Float[Array, "*B R H D"]:
            grouped = q.reshape(*q.shape[:-2], config.num_kv_heads, config.group_size, config.head_dim)
            scores = jnp.einsum("...tkgd,...skd->...kgts", grouped, k, preferred_element_type=jnp.float32)
            mask = visible(start + jnp.arange(q.shape[-3]), keys, layer.window)
            weights = jax.nn.softmax(jnp.where(mask, scores * config.query_scale, -jnp.inf), axis=-1)
            mixed = jnp.einsum(
                "...kgts,...skd->...tkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
            )
            return mixed.reshape(q.shape).astype(q.dtype)

        if length <= block:
            return rows(q, jnp.int32(0))
        blocks = -(-length // block)
        padding = [(0, 0)] * (q.ndim - 3) + [(0, blocks * block - length), (0, 0), (0, 0)]
        split = jnp.pad(q, padding).reshape(*q.shape[:-3], blocks, block, *q.shape[-2:])
        split = jnp.moveaxis(split, -4, 0)
        out = jax.lax.map(lambda pair: rows(*pair), (split, jnp.arange(blocks) * block))
        out = jnp.moveaxis(out, 0, -4)
        return out.reshape(*q.shape[:-3], blocks * block, *q.shape[-2:])[..., :length, :, :]

    return attend
