"""The full cache: every token is kept and read."""

import dataclasses

from kvjax.attention.methods.method import Demand, Method
from kvjax.budget import BudgetProfile


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """What every other method is compared with. Takes no token budget."""

    def profile(self, demand: Demand) -> BudgetProfile:
        return BudgetProfile.full(demand.windows, demand.context)
