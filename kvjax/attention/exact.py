"""Exact top-k: every key is read to rank the tokens. Not fast, but what every estimate is measured against."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax.attention.hybrid import group_weights


def exact_scores(
    q: Float[Array, "B K G D"], k: Float[Array, "B K C D"], filled: Bool[Array, "B K C"], *, scale: float, shared: bool
) -> Float[Array, "B R C"]:
    """Each head's own logits [B H C] or, `shared`, the mean of the group's attention weights [B K C]."""
    logits = jnp.einsum("bkgd,bkcd->bkgc", q, k, preferred_element_type=jnp.float32) * scale
    if shared:
        return group_weights(logits, jnp.ones(q.shape[:3]), filled.astype(jnp.int32))
    return logits.reshape(q.shape[0], -1, k.shape[2])
