"""SnapKV (NeurIPS 2024, arXiv 2404.14469): eviction for each query head, by the attention of the last queries."""

import dataclasses

from kvjax.attention.eviction import Eviction
from kvjax.attention.methods.method import Demand, Method
from kvjax.attention.methods.observation import observation, observation_options
from kvjax.attention.methods.option import MethodOption
from kvjax.budget import BudgetProfile, LayerBudget


@dataclasses.dataclass(frozen=True)
class SnapKV(Method):
    """As published: over keys repeated for every query head, so a view is as many times larger as heads share a key.

    Attributes:
        window: prompt positions at the end, whose queries choose what stays.
        kernel: width of the max-pooling.
    """

    window: int = 32
    kernel: int = 7

    def profile(self, demand: Demand) -> BudgetProfile:
        return BudgetProfile.uniform(demand.windows, demand.context, self._budget(demand))

    def _budget(self, demand: Demand) -> LayerBudget:
        return LayerBudget.selecting(
            demand.token_budget + demand.headroom, observation_window=self.window, pooling_kernel=self.kernel
        )

    @property
    def eviction_options(self) -> tuple[MethodOption, ...]:
        return observation_options(self.window, self.kernel)

    def eviction(self, budget: LayerBudget) -> Eviction | None:
        return observation(budget, per_head=True)


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV (arXiv 2406.02069): SnapKV with most tokens in the first layer and fewest in the last.

    Attributes:
        beta: how steep; the last layer keeps the beta-th part of the mean beyond the window.
    """

    window: int = 8
    beta: int = 20

    def profile(self, demand: Demand) -> BudgetProfile:
        # the room for generated tokens is every layer's, so the series falls over what is kept of prompts
        retained = dataclasses.replace(self._budget(demand), capacity=demand.token_budget)
        pyramid = BudgetProfile.pyramid(
            demand.windows, demand.context - demand.headroom, retained, self.beta, least=self.window
        )
        capacities = [
            budget.capacity + demand.headroom
            for budget, window in zip(pyramid.layers, demand.windows, strict=True)
            if not window
        ]
        return BudgetProfile.from_group_budgets(
            demand.windows, demand.context, capacities, self._budget(demand), group_layers=1
        )
