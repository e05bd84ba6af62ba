"""Cache configuration: every cache of an engine, declared once; allocation, memory and the steps follow it."""

import dataclasses
import functools

import jax.numpy as jnp

from kvjax.attention.methods import Demand, LayerCacheConfig, Method, find_method
from kvjax.budget import LEAST_TOKEN_BUDGET, BudgetProfile, ModelFingerprint
from kvjax.cache import View, Workspace
from kvjax.engine.config import ResolvedConfig
from kvjax.models import DecoderConfig

# float8 has as many exponents as keys need after their norm, and its steps are of a 16th: near enough to choose by
HALVED = {"float32": "bfloat16", "bfloat16": "float8_e4m3fn", "float16": "float8_e4m3fn"}


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Tokens that each layer retains, and the arrays for them.

    Attributes:
        profile: a budget for each layer.
        plans: what the steps do with it, one a layer.
        groups: layers that are prefilled together.
        views: specs, one a layer.
        window: how many of the last queries stage 1 needs at most; 0 where no layer chooses.
        multi_turn: whether stage 1 looks from the last turn of a conversation alone.
    """

    model: DecoderConfig
    layout: ResolvedConfig
    profile: BudgetProfile
    plans: tuple[LayerCacheConfig, ...]
    multi_turn: bool = False

    @classmethod
    def declare(cls, model: DecoderConfig, layout: ResolvedConfig) -> "CacheConfig":
        """The caches of one model.

        Raises:
            ValueError: the method, the token budget or the file of budgets does not fit; says what to change.
        """
        method = find_method(layout.method)
        windows, context = [layer.window for layer in model.layers], layout.max_model_len
        if layout.budgets is not None:
            profile = BudgetProfile.load(layout.budgets, ModelFingerprint.of(model)).within(context)
            profile.check(windows, context)
        else:
            profile = method.profile(
                Demand(windows, context, layout.headroom, layout.token_budget or context, model.head_dim)
            )
        profile, plans = _planned(method, profile, layout, model.head_dim)
        if layout.reselect and any(plan.head_max_retained for plan in plans):
            raise ValueError(
                "a profile with head_tokens leaves gaps in its views, which are not selected anew: end outputs where "
                "a view is full (reselect=False, --when-full stop)"
            )
        caches = cls(model, layout, profile, plans, method.multi_turn)
        chunk = layout.prefill_chunk_size * model.num_layers * model.num_kv_heads * caches._entry_bytes
        if layout.store is not None and 0 < layout.store.host_cache_size < chunk:
            raise ValueError(
                f"host_cache_size={layout.store.host_cache_size} hold no chunk of {layout.prefill_chunk_size} tokens, "
                f"which takes {chunk}: raise --host-cache-size to some of these, or set it to 0"
            )
        return caches

    def within(self, token_budget: int | None) -> "CacheConfig":
        """The configuration of a request with a smaller token budget: that of an engine of that budget, by these pages.

        The arrays are still those declared here. None is the engine's own budget.

        Raises:
            ValueError: it is larger, or needs other shapes; says which budgets a request may have.
        """
        own = self.layout.token_budget
        if token_budget is None or token_budget == own:
            return self
        if own is None:
            source = "has no budget" if self.layout.budgets is None else f"has the budgets of {self.layout.budgets}"
            raise ValueError(f"token_budget={token_budget}: this engine {source}, and none a request: leave it out")
        least = self._least_budget
        if least == own:
            raise ValueError(
                f"token_budget={token_budget}: what is compiled for {self.layout.method!r} with a budget of {own} "
                f"serves no other: give {own}, or leave it out"
            )
        if not least <= token_budget <= own:
            raise ValueError(
                f"token_budget={token_budget} is outside [{least}, {own}], of which {own} is this engine's: give one "
                "within, or leave it out"
            )
        return self._smaller(token_budget)

    @functools.cached_property
    def _least_budget(self) -> int:
        """The smallest token budget of a request; the engine's own if there is no smaller one."""
        low, high = LEAST_TOKEN_BUDGET, self.layout.token_budget or 0
        while low < high:
            middle = (low + high) // 2
            try:
                self._smaller(middle)
            except ValueError:
                low = middle + 1
            else:
                high = middle
        return high

    def _smaller(self, token_budget: int) -> "CacheConfig":
        method, layout = find_method(self.layout.method), dataclasses.replace(self.layout, token_budget=token_budget)
        windows, context = [layer.window for layer in self.model.layers], layout.max_model_len
        page_size = max(plan.page_size for plan in self.plans) or None
        demand = Demand(windows, context, layout.headroom, token_budget, self.model.head_dim, page_size)
        profile, plans = _planned(method, method.profile(demand), layout, self.model.head_dim)
        if not all(plan.serves(smaller) for plan, smaller in zip(self.plans, plans, strict=True)):
            raise ValueError(f"token_budget={token_budget} needs other shapes than this engine's: leave it out")
        return CacheConfig(self.model, layout, profile, plans, self.multi_turn)

    @functools.cached_property
    def decoding(self) -> str:
        """All that decides, beside weights and tokens, what decode steps compute: their KV is stored under it."""
        layout = self.layout
        headroom = f"room {layout.headroom}, {'reselect' if layout.reselect else 'stop'}" if self.window else "no room"
        return f"{layout.method}, budgets {self.profile.digest}, {headroom}"

    @property
    def groups(self) -> tuple[range, ...]:
        return self.profile.groups(self.model.layers, self.layout.group_layers)

    @property
    def window(self) -> int:
        return max(plan.window for plan in self.plans)

    @property
    def views(self) -> tuple[View, ...]:
        return tuple(self._view(plan) for plan in self.plans)

    def workspace(self, tokens: int) -> Workspace:
        """One layer's, for prompts of at most so many tokens."""
        return Workspace.declare(
            kv_heads=self.model.num_kv_heads,
            tokens=tokens,
            head_dim=self.model.head_dim,
            dtype=self.layout.kv_dtype,
            window=self.window,
            query_heads=self.model.num_heads,
        )

    def selected(self, tokens: int, compress_after: int | None) -> int:
        """Tokens of a prompt after which its views are selected; the rest is read through them.

        Args:
            compress_after: as in `SamplingParams`. Where no view chooses, nothing is left out anyway.
        """
        return min(tokens, compress_after) if compress_after and self.window else tokens

    def headroom(self, length: int) -> int | None:
        """Tokens that may follow a prompt before the first view is full; None if the context ends first."""
        headrooms = [plan.capacity - plan.retained(length) for plan in self.plans if plan.eviction is not None]
        return min(headrooms, default=None)

    def full_bytes(self, length: int) -> int:
        """Bytes of the K and V of a prompt with nothing left out but what sliding layers have left behind."""
        seen = sum(min(length, layer.window or length) for layer in self.model.layers)
        return seen * self.model.num_kv_heads * self._entry_bytes

    def retained_bytes(self, length: int) -> int:
        """Bytes that the views keep of a prompt, summaries of pages included."""
        total, item = 0, jnp.dtype(self.layout.kv_dtype).itemsize
        for plan in self.plans:
            entries = plan.retained(length)
            heads = plan.heads(self.model.num_kv_heads, self.model.num_heads)
            if plan.selection is None:
                total += entries * heads * self._entry_bytes
            else:
                total += heads * plan.selection.retained_bytes(entries, self.model.head_dim, item)
        return total

    def read_bytes(self, length: int) -> int:
        """Bytes of KV that a decode step has to read after a prompt: of what is kept, what stage 2 looks at."""
        total, item = 0, jnp.dtype(self.layout.kv_dtype).itemsize
        for plan in self.plans:
            entries = plan.retained(length)
            heads = plan.heads(self.model.num_kv_heads, self.model.num_heads)
            if plan.selection is None:
                total += entries * heads * self._entry_bytes
            else:
                group = self.model.num_heads // heads
                total += heads * plan.selection.read_bytes(entries, self.model.head_dim, item, group)
        return total

    @property
    def _entry_bytes(self) -> int:
        return 2 * self.model.head_dim * jnp.dtype(self.layout.kv_dtype).itemsize

    def _view(self, plan: LayerCacheConfig) -> View:
        return View.declare(
            slots=self.layout.max_num_seqs,
            kv_heads=plan.heads(self.model.num_kv_heads, self.model.num_heads),
            capacity=plan.capacity,
            head_dim=self.model.head_dim,
            dtype=self.layout.kv_dtype,
            page_size=plan.page_size,
            bounds_dtype=HALVED[self.layout.kv_dtype]
            if plan.selection is not None and plan.selection.half_precision_summary
            else None,
            window=plan.window if self.layout.reselect else 0,
            query_heads=self.model.num_heads,
            chooses=plan.chooses,
        )


def _planned(
    method: Method, profile: BudgetProfile, layout: ResolvedConfig, head_dim: int
) -> tuple[BudgetProfile, tuple[LayerCacheConfig, ...]]:
    """The profile with every option of the method, and what its layers do.

    Raises:
        ValueError: a budget that the method cannot spend; where it is of a file, names that and the layer.
    """
    resolved, plans = [], []
    for layer, budget in enumerate(profile.layers):
        try:
            resolved.append(method.resolve(budget, head_dim))
            plans.append(method.plan(resolved[-1], layout.headroom))
        except (TypeError, ValueError) as error:
            if layout.budgets is None:
                raise
            raise ValueError(f"{layout.budgets}: layers[{layer}]: {error}") from error
    return BudgetProfile(tuple(resolved)), tuple(plans)
