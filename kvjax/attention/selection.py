"""Selection (RocketKV's stage 2): which entries of its view a decode step reads. A dataclass a rule.

A method scores units of a view, tokens or whole pages, higher is read; selection and exact attention over what was
selected are common. Views of sliding layers are rings, which this does not know: they stay dense.
"""

import abc
import dataclasses
import math

from jaxtyping import Array, Float, Int

from kvjax.attention.ops import PageView
from kvjax.attention.read_units import ReadUnits


@dataclasses.dataclass(frozen=True)
class Selection(abc.ABC):
    """A way to score what a view holds. Pure functions, safe to trace with the method as a static argument.

    Attributes:
        tokens: most entries that a step attends to exactly.
        dense_threshold: a slot with at most so many entries reads them all. A request of prompt and new tokens within
            the token budget stays below it throughout, whatever else is in the batch.
        half_precision_summary: the summary is kept in a type of half the cache's size: it bounds nearly, for half
            the traffic.
    """

    tokens: int
    dense_threshold: int = dataclasses.field(default=0, kw_only=True)
    half_precision_summary: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.unit < 1:
            raise ValueError(f"page_size={self.unit}: a page has at least one entry")
        if self.tokens < self.unit:
            raise ValueError(f"tokens={self.tokens} is less than the {self.unit} that are read together: read more")

    @property
    def per_head(self) -> bool:
        """Whether each query head selects for itself."""
        return False

    @property
    def unit(self) -> int:
        """Consecutive entries that are read together."""
        return 1

    @property
    def summary(self) -> int:
        """Entries of a page in the summary that `score` reads; 0 where it reads none."""
        return 0

    @property
    def always_newest_page(self) -> bool:
        """Whether the unit that holds the newest entry is always read, as one of `tokens`."""
        return False

    @abc.abstractmethod
    def score(self, pages: PageView) -> Float[Array, "B R U"]:
        """A score for each unit; that of a unit without a filled entry does not matter.

        `pages.bounds` is the summary of pages of `summary` entries. An operation of `pages.ops` runs as a kernel where
        the backend has one.
        """

    @abc.abstractmethod
    def scored_elements(self, entries: int, head_dim: int) -> int:
        """Elements of the cache's size that `score` has to read for one kv head with so many entries."""

    def select(self, pages: PageView, tokens: Int[Array, "B"] | None = None) -> ReadUnits:
        """The units that each row reads, at most `self.tokens` entries, and of each slot at most `tokens`."""
        most = None if tokens is None else tokens // self.unit
        return pages.ops.page_selection(
            pages,
            self.score(pages),
            most,
            page_size=self.unit,
            count=self.tokens // self.unit,
            newest=self.always_newest_page,
        )

    def retained_bytes(self, capacity: int, head_dim: int, itemsize: int) -> int:
        """Bytes of one kv head's view: K, V and the pages' summary."""
        pages = math.ceil(capacity / self.summary) if self.summary else 0
        return (2 * capacity + (1 if self.half_precision_summary else 2) * pages) * head_dim * itemsize

    def read_bytes(self, entries: int, head_dim: int, itemsize: int, group: int = 1) -> int:
        """Bytes that one step has to read for one kv head: to score, and K and V of what was selected.

        Where each query head of the group selects for itself, what they share is counted as often as it is read.
        """
        if entries <= self.dense_threshold:
            return 2 * entries * head_dim * itemsize
        exact = min(self.tokens // self.unit * self.unit, entries) * (group if self.per_head else 1)
        return (self.scored_elements(entries, head_dim) + 2 * exact * head_dim) * itemsize


@dataclasses.dataclass(frozen=True)
class HybridTokens(Selection):
    """RocketKV's stage 2 as published: `dims` head dims of small pages choose tokens, one set for each kv head.

    Pages of one entry are their own summary, which makes it SparQ with a shared set.
    """

    dims: int
    page_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims < 1 or self.page_size < 1:
            raise ValueError(f"dims={self.dims} and page_size={self.page_size} are at least 1")

    @property
    def summary(self) -> int:
        return self.page_size if self.page_size > 1 else 0

    def score(self, pages: PageView) -> Float[Array, "B K C"]:
        return pages.ops.hybrid_scores(pages, page_size=self.page_size, dims=self.dims)

    def scored_elements(self, entries: int, head_dim: int) -> int:
        return self.dims * math.ceil(entries / self.page_size)


@dataclasses.dataclass(frozen=True)
class _Pages(Selection):
    """Reads whole aligned pages, always the one that is being written."""

    page_size: int = 16

    @property
    def unit(self) -> int:
        return self.page_size

    @property
    def summary(self) -> int:
        return self.page_size

    @property
    def always_newest_page(self) -> bool:
        return True

    def scored_elements(self, entries: int, head_dim: int) -> int:
        return (1 if self.half_precision_summary else 2) * head_dim * math.ceil(entries / self.page_size)


@dataclasses.dataclass(frozen=True)
class HybridPages(_Pages):
    """The engine's stage 2: each head's bound over all head dims, averaged over the group as attention weights."""

    def score(self, pages: PageView) -> Float[Array, "B K P"]:
        return pages.ops.page_scores(pages, page_size=self.page_size)


@dataclasses.dataclass(frozen=True)
class QuestSelection(_Pages):
    """Quest: each query head reads the pages with the largest bound on its own logits (arXiv 2406.10774).

    The paper leaves the first two layers dense, which is the caller's to do.
    """

    @property
    def per_head(self) -> bool:
        return True

    def score(self, pages: PageView) -> Float[Array, "B H P"]:
        return pages.ops.quest_scores(pages)


@dataclasses.dataclass(frozen=True)
class ExactTopK(Selection):
    """The tokens of largest attention weight, for each query head or, `shared`, of largest mean over the group."""

    shared: bool = True

    @property
    def per_head(self) -> bool:
        return not self.shared

    def score(self, pages: PageView) -> Float[Array, "B R C"]:
        return pages.ops.exact_scores(pages, shared=self.shared)

    def scored_elements(self, entries: int, head_dim: int) -> int:
        return entries * head_dim
