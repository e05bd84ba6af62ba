"""Options of eviction by a prompt's last queries, which RocketKV and SnapKV share."""

from kvjax.attention.eviction import Observation
from kvjax.attention.methods.option import MethodOption
from kvjax.budget import LayerBudget


def observation_options(window: int, kernel: int) -> tuple[MethodOption, ...]:
    """The options of `Observation` by their names in budgets.

    Args:
        window, kernel: the method's defaults.
    """
    return (
        MethodOption("observation_window", int, window, minimum=1),
        MethodOption("pooling_kernel", int, kernel, minimum=1, odd=True),
        MethodOption("sinks", int, 0, minimum=0),
    )


def observation(budget: LayerBudget, *, per_head: bool = False) -> Observation:
    """The eviction rule of a resolved budget."""
    options = {name: int(value) for name, value in budget.eviction_options or ()}
    return Observation(
        options["observation_window"], kernel=options["pooling_kernel"], sinks=options["sinks"], per_head=per_head
    )
