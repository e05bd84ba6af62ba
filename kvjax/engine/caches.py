"""Every cache of an engine, declared once from a model and a layout: allocation, memory and the steps follow it."""

import dataclasses

from kvjax.attention.methods import Demand, LayerPlan, find_method
from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.cache import View, Workspace
from kvjax.engine.config import Layout
from kvjax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Caches:
    """What each layer keeps, and the arrays for it.

    Attributes:
        profile: a budget for each layer.
        plans: what the steps do with it, a plan a layer.
        groups: layers that are prefilled together.
        views: specs, one a layer.
        window: how many of the last queries stage 1 needs at most; 0 where no layer chooses.
    """

    model: DecoderConfig
    layout: Layout
    profile: BudgetProfile
    plans: tuple[LayerPlan, ...]

    @classmethod
    def declare(cls, model: DecoderConfig, layout: Layout) -> "Caches":
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
                Demand(windows, context, layout.room, layout.token_budget or context, model.head_dim)
            )
        return cls(model, layout, profile, tuple(method.plan(budget, layout.room) for budget in profile.layers))

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

    def room(self, length: int) -> int | None:
        """How many tokens may follow a prompt before the first view is full; None if the context ends first."""
        rooms = [plan.capacity - min(length, plan.keep) for plan in self.plans if plan.stage1 is not None]
        return min(rooms, default=None)

    def _view(self, plan: LayerPlan) -> View:
        return View.declare(
            slots=self.layout.slots,
            kv_heads=plan.heads(self.model.num_kv_heads, self.model.num_heads),
            capacity=plan.capacity,
            head_dim=self.model.head_dim,
            dtype=self.layout.kv_dtype,
            page_size=plan.page_size,
            window=plan.window if self.layout.reselect else 0,
            query_heads=self.model.num_heads,
        )
