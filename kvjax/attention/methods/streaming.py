"""StreamingLLM (ICLR 2024, arXiv 2309.17453): attention sinks and a recent window."""

import dataclasses

from kvjax.attention.eviction import Eviction, Streaming
from kvjax.attention.methods.method import Demand, Method
from kvjax.attention.methods.option import MethodOption
from kvjax.budget import BudgetProfile, LayerBudget


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps `sinks` first tokens; keys stay rotated for their position, where the paper renumbers them."""

    sinks: int = 4

    def profile(self, demand: Demand) -> BudgetProfile:
        budget = LayerBudget.selecting(demand.token_budget + demand.headroom)
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    @property
    def eviction_options(self) -> tuple[MethodOption, ...]:
        return (MethodOption("sinks", int, self.sinks, minimum=0),)

    def eviction(self, budget: LayerBudget) -> Eviction | None:
        return Streaming(sinks=int(dict(budget.eviction_options or ())["sinks"]))
