"""StreamingLLM (ICLR 2024, arXiv 2309.17453): the first tokens and the last ones, whatever they say."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def streaming_scores(rows: int, tokens: int, sinks: int) -> Float[Array, "R T"]:
    """Scores that keep the first `sinks` positions and then the latest. The same for every row."""
    places = jnp.arange(tokens, dtype=jnp.float32)  # exact up to 2 ** 24 tokens
    return jnp.broadcast_to(jnp.where(places < sinks, jnp.inf, places), (rows, tokens))
