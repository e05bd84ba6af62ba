"""Ranks of pages: integers in the order of the scores, by which kernels choose.

A kernel then only compares and counts. The n-th largest of 32-bit integers is found bit by bit, in 32 counts over all
of them, where sorting would move them; what XLA makes of this here is one pass over the scores.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -(2**31)  # the rank of a page that is never chosen; that of every other is above
BITS = 32  # of a rank


def ranks(scores: Float[Array, "B R P"], entries: Int[Array, "B"], page_size: int) -> Int[Array, "B R P"]:
    """Of each page an integer: larger for a larger score, largest for the newest page, `NEVER` without an entry."""
    pages = jnp.arange(scores.shape[2])
    newest = pages == ((entries - 1) // page_size)[:, None, None]
    eligible = pages * page_size < entries[:, None, None]
    scores = jnp.where(newest, jnp.inf, scores.astype(jnp.float32))
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    # of negative numbers those nearer to 0 are smaller by their bits, but for the sign
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = jnp.where(scores == 0, 0, ordered)  # and -0 is 0
    return jnp.where(eligible & (scores > -jnp.inf), ordered, NEVER)


def limits(slots: int, count: int, most: Int[Array, "B"] | None) -> Int[Array, "B"]:
    """Pages of each row of a slot."""
    every = jnp.full(slots, count, jnp.int32)
    return every if most is None else jnp.clip(most.astype(jnp.int32), 0, every)
