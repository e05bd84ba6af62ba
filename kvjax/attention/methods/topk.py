"""Exact top-k: everything is kept and every key is read, but only the best tokens are attended to."""

import dataclasses

from kvjax.attention.methods.method import Demand, Method
from kvjax.attention.selection import ExactTopK, Selection
from kvjax.budget import BudgetProfile, LayerBudget


@dataclasses.dataclass(frozen=True)
class TopK(Method):
    """The best that a selection of so many tokens can do. Saves no time: it is what estimates are measured against.

    Attributes:
        shared: the heads of a group choose one set together, as RocketKV's do.
    """

    shared: bool = True

    def profile(self, demand: Demand) -> BudgetProfile:
        budget = LayerBudget(demand.context)
        if demand.token_budget < demand.context:
            budget = LayerBudget(demand.context, selected_tokens=demand.token_budget)
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    def selection(self, budget: LayerBudget) -> Selection | None:
        tokens = budget.selected_tokens or 0
        return ExactTopK(tokens, self.shared, dense_threshold=tokens)
