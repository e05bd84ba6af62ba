"""Page selection: the pages of a view that a decode step reads, the best by score and always the newest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.read_units import ReadUnits, choose
from kvjax.pallas.dispatch import dispatch
from kvjax.pallas.page_selection import gpu, tpu


def page_selection(
    scores: Float[Array, "B R P"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    count: int,
    most: Int[Array, "B"] | None = None,
    implementation: str | None = None,
) -> ReadUnits:
    """At most `count` pages of each row, as `Ops.page_selection` with the newest page always among them.

    Of equal scores the earlier page is better; 0 and -0 are equal. A page without an entry is never chosen, nor is one
    that scores -inf. All implementations choose the same pages: the reference best first, kernels by their index.

    Args:
        scores: those of pages without an entry may be anything; no other is NaN.
        entries: leading entries of a slot that are filled.
        most: pages of each row of a slot, where that is fewer than `count`.
        implementation: see `dispatch`.
    """
    implementations = {"reference": reference, "tpu": tpu.page_selection, "gpu": gpu.page_selection}
    return dispatch(
        "page_selection", implementations, implementation, scores, entries, page_size=page_size, count=count, most=most
    )


def reference(
    scores: Float[Array, "B R P"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    count: int,
    most: Int[Array, "B"] | None = None,
) -> ReadUnits:
    """In jax.numpy, everywhere."""
    pages = jnp.arange(scores.shape[2])
    newest = (entries - 1) // page_size
    eligible = jnp.broadcast_to(pages * page_size < entries[:, None, None], scores.shape)
    return choose(jnp.where(pages == newest[:, None, None], jnp.inf, scores), eligible, count, most)
