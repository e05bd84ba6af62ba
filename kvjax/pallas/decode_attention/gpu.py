"""Attention over the whole of a view on a Hopper GPU, tile after tile, split over the sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.pallas import hopper


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
        NotImplementedError: for other types than 16-bit floats, and views of less than a tile.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    hopper.check(grouped, k)
    return hopper.attend(grouped, k, v, entries.astype(jnp.int32), scale=scale).reshape(q.shape)
