"""Compression methods: from one token budget to a budget for each layer, and the stages that spend it."""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from kvjax.attention.eviction import Eviction
from kvjax.attention.methods.option import MethodOption, resolve_options
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
    """A way to spend a budget. A new one is a subclass: a `profile`, the stages that it has, and their options.

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

    @property
    def eviction_options(self) -> tuple[MethodOption, ...]:
        """The options of `eviction` that a budget may set."""
        return ()

    @property
    def selection_options(self) -> tuple[MethodOption, ...]:
        """The options of `selection` that a budget may set."""
        return ()

    def eviction(self, budget: LayerBudget) -> Eviction | None:
        """What chooses the tokens of a view that holds less than the context. None: this method keeps everything.

        Args:
            budget: resolved, with every option that is declared.
        """
        return None

    def selection(self, budget: LayerBudget) -> Selection | None:
        """What chooses the entries that a step reads of a view larger than `selected_tokens`. None: it reads all.

        Args:
            budget: resolved, with every option that is declared.
        """
        return None

    def resolve(self, budget: LayerBudget, head_dim: int | None = None) -> LayerBudget:
        """The budget with every option that the method declares, checked; the default where it sets none.

        Args:
            head_dim: of the model; None leaves options that it bounds unchecked.

        Raises:
            TypeError: an option of another type than declared.
            ValueError: an option that is not declared, or out of bounds; names those that are.
        """
        name, eviction, selection = type(self).__name__, budget.eviction_options, budget.selection_options
        if eviction is not None:
            eviction = resolve_options(name, "eviction", self.eviction_options, eviction, head_dim)
        if budget.selected_tokens is not None:
            selection = resolve_options(name, "selection", self.selection_options, selection, head_dim)
        return dataclasses.replace(budget, eviction_options=eviction, selection_options=selection)

    def plan(self, budget: LayerBudget, headroom: int) -> LayerCacheConfig:
        """What one layer does with its budget.

        Raises:
            TypeError: as `resolve`.
            ValueError: as `resolve`, the method lacks a stage that the budget calls for, or what it must keep leaves no
                `headroom`.
        """
        budget = self.resolve(budget)
        eviction = None if budget.eviction_options is None else self.eviction(budget)
        selection = None if budget.selected_tokens is None else self.selection(budget)
        name = type(self).__name__
        if eviction is None and budget.eviction_options is not None:
            raise ValueError(
                f"capacity={budget.capacity} calls for a choice of tokens, and {name} makes none: use another method"
            )
        if selection is None and budget.selected_tokens is not None:
            raise ValueError(f"selected_tokens={budget.selected_tokens} has no effect with {name}: leave it out")
        unit = 1 if selection is None else max(selection.unit, selection.summary)
        if unit > 1 and budget.capacity >= WORTH_TILES * unit:
            unit *= TILE
        capacity = -(-budget.capacity // unit) * unit
        if eviction is None:
            return LayerCacheConfig(capacity, selection=selection)
        self._check_retained(budget, eviction)
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

    @staticmethod
    def _check_retained(budget: LayerBudget, eviction: Eviction) -> None:
        """That the view, and each kv head's share of it, holds what the eviction always keeps."""
        least = eviction.min_retained
        if least > budget.capacity:
            options = ", ".join(f"{name}={value}" for name, value in budget.eviction_options or ())
            raise ValueError(
                f"the {least} entries that always stay by {options or eviction} must be at most capacity="
                f"{budget.capacity}: keep fewer, or raise the capacity to {least}"
            )
        if any(retained < least for retained in budget.head_tokens or ()):
            raise ValueError(
                f"head_tokens={budget.head_tokens}: a kv head keeps from {least}, which {eviction} always keeps, to "
                f"capacity={budget.capacity} tokens"
            )
