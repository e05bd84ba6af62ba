"""Operations of attention: the table that a backend fills with its kernels, and the table in jax.numpy.

Prefill, eviction and decode are each composed once, of these operations. A method whose score is an operation runs the
kernel of whichever table it is handed.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import dense, observation, scores
from kvjax.attention.read_units import ReadUnits, attend_selected, choose, filled_entries


@dataclasses.dataclass(frozen=True)
class Ops:
    """One implementation of each operation, by name. `dataclasses.replace` changes one of them.

    An operation raises NotImplementedError, with the reason, for a case that it does not implement. Those of a decode
    step take a `PageView` first.

    Attributes:
        prefill_attention: `dense.prefill_attention`.
        attention_received: `observation.attention_received`; from `length` on it may return anything.
        page_scores: `(pages, *, page_size)` to [B K P], `scores.bounded_scores`.
        quest_scores: `(pages)` to [B H P].
        hybrid_scores: `(pages, *, page_size, dims)` to [B K C].
        exact_scores: `(pages, *, shared)` to [B R C].
        page_selection: `(pages, scores, most, *, page_size, count, newest)` to the `ReadUnits` of largest score, at
            most `count` of each row, or `most` of each slot where that is not None; with `newest` the page that is
            being written is always one of them.
        selected_attention: `(pages, units, *, page_size)` to [B K G D], zeros for a slot that selects nothing.
        decode_attention: `(pages, *, window)` to [B K G D], over all entries; see `dense.decode_attention`.
    """

    prefill_attention: Callable[..., Array]
    attention_received: Callable[..., Array]
    page_scores: Callable[..., Array]
    quest_scores: Callable[..., Array]
    hybrid_scores: Callable[..., Array]
    exact_scores: Callable[..., Array]
    page_selection: Callable[..., ReadUnits]
    selected_attention: Callable[..., Array]
    decode_attention: Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class PageView:
    """The queries of one decode step and the views they read, as selection rules and operations see them.

    Attributes:
        q: one token a slot, rotated, the query heads of a kv head together.
        k, v: entries that hold nothing may be anything.
        positions: of each entry its token position, negative where it holds nothing.
        position: of the token that attends; its own key is among the entries.
        entries: leading entries of a slot that may be filled, 0 for a slot that is not decoding.
        bounds: the summary of pages (`pages.summarize`); None where the rule has none.
        scale: multiplies q.k before the softmax.
        contiguous: each head fills the first entries of a slot, without gaps.
    """

    q: Float[Array, "B K G D"]
    k: Float[Array, "B K C D"]
    v: Float[Array, "B K C D"]
    positions: Int[Array, "B K C"]
    position: Int[Array, "B"]
    entries: Int[Array, "B"]
    bounds: Float[Array, "B K P 2 D"] | None = None
    _: dataclasses.KW_ONLY
    scale: float
    contiguous: bool = True
    ops: Ops

    @property
    def filled(self) -> Bool[Array, "B K C"]:
        """The entries that hold a key."""
        return filled_entries(self.positions, self.entries)

    @property
    def summary(self) -> Float[Array, "B K P 2 D"]:
        """`bounds`, for rules that cannot do without."""
        if self.bounds is None:
            raise ValueError("this method reads the summary of pages: pass what pages.summarize returned")
        return self.bounds


def _page_scores(pages: PageView, *, page_size: int) -> Float[Array, "B K P"]:
    return scores.bounded_scores(pages.q, pages.summary, pages.filled, page_size=page_size, scale=pages.scale)


def _quest_scores(pages: PageView) -> Float[Array, "B H P"]:
    return scores.quest_scores(pages.q, pages.summary)


def _hybrid_scores(pages: PageView, *, page_size: int, dims: int) -> Float[Array, "B K C"]:
    return scores.hybrid_scores(pages.q, pages.k, pages.bounds, pages.filled, page_size=page_size, dims=dims)


def _exact_scores(pages: PageView, *, shared: bool) -> Float[Array, "B R C"]:
    return scores.exact_scores(pages.q, pages.k, pages.filled, scale=pages.scale, shared=shared)


def _page_selection(
    pages: PageView,
    scored: Float[Array, "B R U"],
    most: Int[Array, "B"] | None,
    *,
    page_size: int,
    count: int,
    newest: bool,
) -> ReadUnits:
    rows = scored.shape[1] // pages.k.shape[1]
    eligible = jnp.repeat(scores.page_counts(pages.filled, page_size) > 0, rows, axis=1)
    if newest:
        last = (pages.entries - 1) // page_size
        scored = jnp.where(jnp.arange(scored.shape[2]) == last[:, None, None], jnp.inf, scored)
    return choose(scored, eligible, count, most)


def _selected_attention(pages: PageView, units: ReadUnits, *, page_size: int) -> Float[Array, "B K G D"]:
    return attend_selected(pages.q, pages.k, pages.v, pages.filled, units, page_size=page_size, scale=pages.scale)


def _decode_attention(pages: PageView, *, window: int | None) -> Float[Array, "B K G D"]:
    q = pages.q.reshape(pages.q.shape[0], -1, pages.q.shape[3])
    views = pages.k, pages.v, pages.positions, pages.position, pages.entries
    return dense.decode_attention(q, *views, scale=pages.scale, window=window).reshape(pages.q.shape)


REFERENCE_OPS = Ops(
    prefill_attention=dense.prefill_attention,
    attention_received=observation.attention_received,
    page_scores=_page_scores,
    quest_scores=_quest_scores,
    hybrid_scores=_hybrid_scores,
    exact_scores=_exact_scores,
    page_selection=_page_selection,
    selected_attention=_selected_attention,
    decode_attention=_decode_attention,
)
