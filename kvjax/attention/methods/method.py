"""Compression methods: from one token budget to a budget for each layer, and the stages that spend it."""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.attention.eviction import Eviction
from kvjax.attention.selection import Selection
from kvjax.budget import BudgetProfile, LayerBudget
from kvjax.cache import SlotLimits

# A TPU lays out the summary of whole tiles of pages as a kernel reads it, any other it copies at every step. The room
# for them, at most 7 of 256 pages, is never filled.
TILE = 8
WORTH_TILES = 256


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a token budget has to serve.

    Attributes:
        windows: of each layer its sliding window, None where it sees everything. Sliding layers are left alone.
        context: most tokens of a sequence, prompt and generated (S).
        headroom: entries of a view that stay free for generated tokens (N).
        token_budget: KV pairs for each kv head, layer and step (t); what they pay for is the method's to say.
        head_dim: of the model (D).
        page_size: entries of a page of the views' summary, where they are settled; None leaves them to the method.
    """

    windows: Sequence[int | None]
    context: int
    headroom: int
    token_budget: int
    head_dim: int
    page_size: int | None = None


@dataclasses.dataclass(frozen=True)
class LayerCacheConfig:
    """What the compiled steps do in one layer. Hashable, and static to jit.

    Attributes:
        capacity: entries of the view, whole pages.
        eviction: chooses what the view keeps; None where nothing is chosen, and the view keeps the last entries.
        max_retained: most tokens that stage 1 keeps; the other entries are room for generated ones.
        head_max_retained: most tokens that each kv head keeps, where they are not the same.
        selection: chooses what a step reads; None where it reads the whole view.
    """

    capacity: int
    eviction: Eviction | None = None
    max_retained: int = 0
    selection: Selection | None = None
    head_max_retained: tuple[int, ...] | None = None

    @property
    def window(self) -> int:
        """How many of the last queries the layer must know; 0 if none."""
        return 0 if self.eviction is None else self.eviction.window

    @property
    def page_size(self) -> int:
        """Entries of a page of the view's summary; 0 without a summary."""
        return 0 if self.selection is None else self.selection.summary

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen: what the view keeps, or what a step reads."""
        return self.eviction is not None or self.selection is not None

    def limits(self, begin: int = 0) -> SlotLimits:
        """Of a request that this is the plan of, and whose last turn begins at position `begin`."""
        tokens, dense_threshold = (
            (0, 0) if self.selection is None else (self.selection.tokens, self.selection.dense_threshold)
        )
        return SlotLimits(*(np.int32(number) for number in (self.max_retained, tokens, dense_threshold, begin)))

    def serves(self, other: "LayerCacheConfig") -> bool:
        """Whether steps compiled for this plan can follow another one: the same stages, none of its numbers larger."""
        compiled, requested = self.selection, other.selection
        if compiled is not None and requested is not None:
            if requested.tokens > compiled.tokens or requested.dense_threshold > compiled.dense_threshold:
                return False
            requested = dataclasses.replace(requested, tokens=compiled.tokens, dense_threshold=compiled.dense_threshold)
        smaller = other.capacity <= self.capacity and other.max_retained <= self.max_retained
        same = self.eviction == other.eviction and self.head_max_retained == other.head_max_retained
        return smaller and same and compiled == requested

    def retained(self, length: int) -> int:
        """Entries that the view holds of a prompt of `length` tokens."""
        return min(length, self.capacity if self.eviction is None else self.max_retained)

    def heads(self, kv_heads: int, query_heads: int) -> int:
        """Heads of the view: as many as query heads where each of them keeps tokens of its own."""
        return query_heads if self.eviction is not None and self.eviction.per_head else kv_heads


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """A way to spend a budget. A new one is a subclass: a `profile`, and the stages that it has.

    Attributes:
        multi_turn: stage 1 chooses with the queries of a conversation's last turn alone, where that is shorter than the
            window.
    """

    multi_turn: bool = dataclasses.field(default=False, kw_only=True)

    @abc.abstractmethod
    def profile(self, demand: Demand) -> BudgetProfile:
        """The budgets that a token budget means for this method.

        Raises:
            ValueError: it is too small, or leaves no room; the message says what to change.
        """

    def eviction(self, budget: LayerBudget) -> Eviction | None:
        """What chooses the tokens of a view that holds less than the context. None: this method keeps everything."""
        return None

    def selection(self, budget: LayerBudget) -> Selection | None:
        """What chooses the entries that a step reads of a view larger than `stage2_tokens`. None: it reads all."""
        return None

    def plan(self, budget: LayerBudget, headroom: int) -> LayerCacheConfig:
        """What one layer does with its budget.

        Raises:
            ValueError: the method lacks a stage that the budget calls for, or what it must keep leaves no `headroom`.
        """
        eviction = None if budget.observation_window is None else self.eviction(budget)
        selection = None if budget.stage2_tokens is None else self.selection(budget)
        name = type(self).__name__
        if eviction is None and budget.observation_window is not None:
            raise ValueError(
                f"capacity={budget.capacity} calls for a choice of tokens, and {name} makes none: use another method"
            )
        if selection is None and budget.stage2_tokens is not None:
            raise ValueError(f"stage2_tokens={budget.stage2_tokens} has no effect with {name}: leave it out")
        unit = 1 if selection is None else max(selection.unit, selection.summary)
        if unit > 1 and budget.capacity >= WORTH_TILES * unit:
            unit *= TILE
        capacity = -(-budget.capacity // unit) * unit
        if eviction is None:
            return LayerCacheConfig(capacity, selection=selection)
        max_retained = budget.capacity - headroom
        if max_retained < eviction.min_retained:
            raise ValueError(
                f"of capacity={budget.capacity} entries {headroom} are room for generated tokens; "
                f"{max_retained} others are fewer than the {eviction.min_retained} that {eviction} always keeps: "
                "raise the budget, or lower --headroom"
            )
        if budget.head_tokens is not None and eviction.per_head:
            raise ValueError(f"{name} keeps tokens for each query head, the budget for each kv head: use rocketkv")
        return LayerCacheConfig(capacity, eviction, max_retained, selection, budget.head_tokens)
