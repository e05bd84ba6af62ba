"""Scores of a view's pages and tokens, by which a decode step selects: hybrid attention (RocketKV), Quest, exact top-k.

Hybrid attention has two estimates of a page's logits and one softmax. `sparse_queries` is the paper's: few head dims,
one sign for the group. `bounding_queries` takes all head dims and each head's own sign: a bound from above.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention.dense import MASKED

_TINY = 1e-30  # a query of zeros weighs everything alike, and is not NaN


def sparse_queries(q: Float[Array, "B K G D"], dims: int) -> tuple[Float[Array, "B K G 2 D"], Float[Array, "B K G"]]:
    """Queries over (maximum, minimum) of a page, zero but at the `dims` head dims of largest `sum_g |q|`.

    At each of those all heads of the group meet the page's maximum where `sum_g q > 0`, else its minimum. With
    several heads the sign is shared, so the product is no bound of q.k.

    Returns:
        The queries, and each head's temperature `sqrt(D * sum|q[dims]| / sum|q|)`.

    Raises:
        ValueError: where `dims` is not in 1 to D.
    """
    head_dim = q.shape[-1]
    if not 1 <= dims <= head_dim:
        raise ValueError(f"dims={dims} is not in 1 to head_dim={head_dim}")
    size = jnp.abs(q.astype(jnp.float32))
    _, best = jax.lax.top_k(jnp.sum(size, axis=2), dims)  # [B, K, dims]
    used = jnp.any(best[..., None] == jnp.arange(head_dim), axis=2)[:, :, None]  # [B, K, 1, D]
    up = jnp.sum(q.astype(jnp.float32), axis=2, keepdims=True) > 0
    share = jnp.sum(jnp.where(used, size, 0), axis=-1) / jnp.maximum(jnp.sum(size, axis=-1), _TINY)
    queries = jnp.stack([jnp.where(used & up, q, 0), jnp.where(used & ~up, q, 0)], axis=3)
    return queries, jnp.sqrt(head_dim * share)


def bounding_queries(q: Float[Array, "B K G D"]) -> Float[Array, "B K G 2 D"]:
    """Queries over (maximum, minimum) of a page: `relu(q).max - relu(-q).min = sum_d max(q_d max_d, q_d min_d)`."""
    return jnp.stack([jnp.maximum(q, 0), jnp.minimum(q, 0)], axis=3)


def page_logits(queries: Float[Array, "B K G 2 D"], bounds: Float[Array, "B K P 2 D"]) -> Float[Array, "B K G P"]:
    """One matrix product of depth 2D, accumulated in float32."""
    rows, pages = (x.reshape(*x.shape[:3], -1) for x in (queries, bounds))
    return jnp.einsum("bkgx,bkpx->bkgp", rows, pages, preferred_element_type=jnp.float32)


def page_counts(filled: Bool[Array, "B K C"], page_size: int) -> Int[Array, "B K P"]:
    """Filled entries of each page."""
    padded = jnp.pad(filled, [(0, 0), (0, 0), (0, -filled.shape[2] % page_size)])
    return jnp.sum(padded.reshape(*padded.shape[:2], -1, page_size), axis=-1)


def group_weights(
    logits: Float[Array, "B K G P"], temperature: Float[Array, "B K G"], counts: Int[Array, "B K P"]
) -> Float[Array, "B K P"]:
    """The weight that one entry of each page has in a softmax over all entries, averaged over the group.

    Entries of a page share its logit, so the softmax over entries is one over pages that are counted as often as
    they have entries. An empty page gets 0.
    """
    held = (counts > 0)[:, :, None]
    logits = jnp.where(held, logits / jnp.maximum(temperature, _TINY)[..., None], MASKED)
    weights = jnp.where(held, jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)), 0)
    total = jnp.sum(weights * counts[:, :, None], axis=-1, keepdims=True)
    return jnp.mean(weights / jnp.maximum(total, _TINY), axis=2)


def hybrid_scores(
    q: Float[Array, "B K G D"],
    k: Float[Array, "B K C D"],
    bounds: Float[Array, "B K P 2 D"] | None,
    filled: Bool[Array, "B K C"],
    *,
    page_size: int,
    dims: int,
) -> Float[Array, "B K C"]:
    """The paper's score of each entry: `sparse_queries` against its page, softmax over the entries, group mean.

    Args:
        bounds: the pages' summary; None for pages of one entry, which are their own summary.
        dims: head dims that are read of a summary, 1 to D.
    """
    queries, temperature = sparse_queries(q, dims)
    if bounds is None:
        logits = jnp.einsum("bkgd,bkcd->bkgc", jnp.sum(queries, 3), k, preferred_element_type=jnp.float32)
    else:
        logits = page_logits(queries, bounds)
    weights = group_weights(logits, temperature, page_counts(filled, page_size))
    return jnp.repeat(weights, page_size, axis=2)[:, :, : k.shape[2]]


def bounded_scores(
    q: Float[Array, "B K G D"],
    bounds: Float[Array, "B K P 2 D"],
    filled: Bool[Array, "B K C"],
    *,
    page_size: int,
    scale: float,
) -> Float[Array, "B K P"]:
    """The engine's score of each page: each head's upper bound times `scale`, softmax over entries, group mean."""
    temperature = jnp.full(q.shape[:3], 1 / scale)
    return group_weights(page_logits(bounding_queries(q), bounds), temperature, page_counts(filled, page_size))


def quest_scores(q: Float[Array, "B K G D"], bounds: Float[Array, "B K P 2 D"]) -> Float[Array, "B H P"]:
    """Quest (arXiv 2406.10774): `sum_d max(q_d max_d, q_d min_d)` of each page, for each query head."""
    return page_logits(bounding_queries(q), bounds).reshape(q.shape[0], -1, bounds.shape[2])


def exact_scores(
    q: Float[Array, "B K G D"], k: Float[Array, "B K C D"], filled: Bool[Array, "B K C"], *, scale: float, shared: bool
) -> Float[Array, "B R C"]:
    """By every key: each head's own logits [B H C] or, `shared`, the mean of the group's attention weights [B K C]."""
    logits = jnp.einsum("bkgd,bkcd->bkgc", q, k, preferred_element_type=jnp.float32) * scale
    if shared:
        return group_weights(logits, jnp.ones(q.shape[:3]), filled.astype(jnp.int32))
    return logits.reshape(q.shape[0], -1, k.shape[2])
