"""Retention: from scores to the positions of a workspace that stay, and a view of one slot that holds them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import View, Workspace


def retain(
    scores: Float[Array, "R T"],
    length: Int[Array, ""],
    recent: Int[Array, ""],
    *,
    max_retained: int,
    capacity: int,
    budget: Int[Array, ""] | Int[Array, "R 1"] | None = None,
) -> Int[Array, "R C"]:
    """The positions a view keeps of a prompt: its last `recent` ones and the best of the others.

    Higher scores stay, of equal ones the earlier position. A prompt of at most `max_retained` tokens stays whole.

    Args:
        scores: of positions 0 to T - 1; those from `length - recent` on do not matter.
        length: tokens of the prompt, at most T.
        max_retained: most positions to keep, `recent` included; at most `capacity`.
        capacity: entries of the view, C.
        budget: keep only so many, `recent` to `max_retained`, or so many of each row. A search changes it without
            compiling again.

    Returns:
        For each row ascending positions, then -1.

    Raises:
        ValueError: where `max_retained` exceeds the capacity.
    """
    if not 1 <= max_retained <= capacity:
        raise ValueError(
            f"max_retained={max_retained} is not in 1 to capacity={capacity}: keep fewer tokens or make the view larger"
        )
    tokens = scores.shape[1]
    places = jnp.arange(tokens)
    ranked = jnp.where(places >= length - recent, jnp.inf, scores)
    values, positions = jax.lax.top_k(jnp.where(places < length, ranked, -jnp.inf), min(max_retained, tokens))
    retained = values > -jnp.inf
    if budget is not None:
        retained &= jnp.arange(retained.shape[1]) < budget
    positions = jnp.sort(jnp.where(retained, positions, tokens), axis=1)
    positions = jnp.where(positions < tokens, positions, -1)
    return jnp.pad(positions, ((0, 0), (0, capacity - positions.shape[1])), constant_values=-1)


def gather(workspace: Workspace, positions: Int[Array, "R C"]) -> View:
    """A view of one slot that holds the given positions of a workspace, zeros where a position is -1.

    Rows may be kv heads or, for methods that select for each query head, query heads: row r reads kv head
    `r // (R / K)`. Keys keep the rotation of the position they were computed at.
    """
    rows = jnp.arange(positions.shape[0]) // (positions.shape[0] // workspace.k.shape[0])
    held = positions >= 0

    def take(source: Float[Array, "K T D"]) -> Float[Array, "1 R C D"]:
        return jnp.where(held[..., None], source[rows[:, None], jnp.maximum(positions, 0)], 0)[None]

    used = jnp.max(jnp.sum(held, axis=1, dtype=jnp.int32), keepdims=True)
    return View(take(workspace.k), take(workspace.v), positions[None], used)
