"""The score of each page of a view: how much of the attention its entries would get, by the bound of its summary."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention.scores import bounded_scores
from kvjax.pallas.dispatch import dispatch
from kvjax.pallas.page_scores import gpu, tpu


def page_scores(
    q: Float[Array, "B K G D"],
    bounds: Float[Array, "B K P 2 D"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    scale: float,
    implementation: str | None = None,
) -> Float[Array, "B K P"]:
    """The engine's score of each page (`scores.bounded_scores`), 0 for one without an entry.

    Args:
        bounds: of each page the largest and the smallest key, elementwise; of pages without an entry anything.
        entries: leading entries of a slot that are filled.
        scale: multiplies q.k before the softmax.
        implementation: see `dispatch`.
    """
    implementations = {"reference": reference, "tpu": tpu.page_scores, "gpu": gpu.page_scores}
    return dispatch(
        "page_scores", implementations, implementation, q, bounds, entries, page_size=page_size, scale=scale
    )


def reference(
    q: Float[Array, "B K G D"],
    bounds: Float[Array, "B K P 2 D"],
    entries: Int[Array, "B"],
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K P"]:
    """In jax.numpy, everywhere."""
    slots, kv_heads, pages = bounds.shape[:3]
    filled = jnp.arange(pages * page_size) < entries[:, None, None]
    filled = jnp.broadcast_to(filled, (slots, kv_heads, pages * page_size))
    return bounded_scores(q, bounds, filled, page_size=page_size, scale=scale)
