"""Quest (ICML 2024, arXiv 2406.10774): each query head ranks pages by an upper bound of its own logits."""

from jaxtyping import Array, Float

from kvjax.attention.hybrid import bounding_queries, page_logits


def quest_scores(q: Float[Array, "B K G D"], bounds: Float[Array, "B K P 2 D"]) -> Float[Array, "B H P"]:
    """`sum_d max(q_d max_d, q_d min_d)` of each page, for each query head."""
    logits = page_logits(bounding_queries(q), bounds)
    return logits.reshape(q.shape[0], -1, bounds.shape[2])
