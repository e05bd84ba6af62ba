"""Quest (ICML 2024, arXiv 2406.10774): a full view, of which a query head reads the pages of largest bounds."""

import dataclasses

from kvjax.attention import selection
from kvjax.attention.methods.method import Demand, Method
from kvjax.budget import BudgetProfile, LayerBudget


@dataclasses.dataclass(frozen=True)
class Quest(Method):
    """As published: the token budget is what each query head attends to; reading the pages' summaries comes on top.

    Attributes:
        page_size: entries of a page.
        dense_layers: so many of the first layers read everything.
    """

    page_size: int = 16
    dense_layers: int = 2

    def profile(self, demand: Demand) -> BudgetProfile:
        tokens = max(demand.token_budget // self.page_size, 1) * self.page_size
        full = BudgetProfile.full(demand.windows, demand.context)
        if tokens >= demand.context:
            return full
        sparse = LayerBudget(demand.context, selected_tokens=tokens, page_size=self.page_size)
        layers = BudgetProfile.uniform(demand.windows, demand.context, sparse).layers
        return BudgetProfile(full.layers[: self.dense_layers] + layers[self.dense_layers :])

    def selection(self, budget: LayerBudget) -> selection.Selection | None:
        tokens = budget.selected_tokens or 0
        return selection.QuestSelection(tokens, budget.page_size, dense_threshold=tokens)
