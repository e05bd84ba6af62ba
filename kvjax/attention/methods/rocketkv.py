"""RocketKV (ICML 2025, arXiv 2502.14051): eviction by a prompt's last queries, selection by each new one."""

import dataclasses
import math
from collections.abc import Sequence

from kvjax.attention.eviction import Eviction
from kvjax.attention.methods.method import Demand, Method
from kvjax.attention.methods.observation import observation, observation_options
from kvjax.attention.methods.option import MethodOption
from kvjax.attention.selection import HybridPages, HybridTokens, Selection
from kvjax.budget import BudgetProfile, LayerBudget, adaptive_split, sorted_options, stage2_split

PAGES = (4, 8, 16)  # entries of a page that is read as a whole
FEWEST_PAGES = 2  # one of them is the page being written
# of stage 2 as published: the head dims that it estimates with, which have no default, for they follow the split
HYBRID_OPTIONS = (MethodOption("head_dims", int, minimum=1, maximum="head_dim"),)


@dataclasses.dataclass(frozen=True)
class RocketKVFaithful(Method):
    """Both stages as published: small pages and few head dims choose single tokens.

    Attributes:
        window: prompt positions at the end, whose queries choose what stays (W); 128 in the paper's multi-turn runs.
        kernel: width of stage 1's max-pooling.
    """

    window: int = 32
    kernel: int = 63

    def profile(self, demand: Demand) -> BudgetProfile:
        return BudgetProfile.uniform(demand.windows, demand.context, self._split(demand))

    def _split(self, demand: Demand) -> LayerBudget:
        return adaptive_split(
            demand.context,
            demand.headroom,
            demand.token_budget,
            demand.head_dim,
            observation_window=self.window,
            pooling_kernel=self.kernel,
        )

    @property
    def eviction_options(self) -> tuple[MethodOption, ...]:
        return observation_options(self.window, self.kernel)

    @property
    def selection_options(self) -> tuple[MethodOption, ...]:
        return HYBRID_OPTIONS

    def eviction(self, budget: LayerBudget) -> Eviction | None:
        return observation(budget)

    def selection(self, budget: LayerBudget) -> Selection | None:
        return hybrid_tokens(budget)


@dataclasses.dataclass(frozen=True)
class RocketKV(RocketKVFaithful):
    """The same two stages for speed: all head dims of aligned pages choose whole pages, at no more bytes a step.

    The pages' summaries are kept in a type of half the cache's size, which leaves more of the traffic to tokens.
    """

    def profile(self, demand: Demand) -> BudgetProfile:
        split = self._split(demand)
        if split.selected_tokens is not None:
            pages = PAGES if demand.page_size is None else (demand.page_size,)
            split = paged(split, demand.token_budget, demand.headroom + self.window, pages)
        return BudgetProfile.uniform(demand.windows, demand.context, split)

    @property
    def selection_options(self) -> tuple[MethodOption, ...]:
        return ()  # all head dims score

    def selection(self, budget: LayerBudget) -> Selection | None:
        tokens, pages = budget.selected_tokens or 0, math.ceil(budget.capacity / budget.page_size)
        return HybridPages(
            tokens, budget.page_size, half_precision_summary=True, dense_threshold=tokens + math.ceil(pages / 2)
        )


@dataclasses.dataclass(frozen=True)
class RocketKVStage1(RocketKVFaithful):
    """Stage 1 alone: the token budget is what a view keeps, and a step reads all of it."""

    def profile(self, demand: Demand) -> BudgetProfile:
        budget = LayerBudget.selecting(
            demand.token_budget + demand.headroom, observation_window=self.window, pooling_kernel=self.kernel
        )
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    @property
    def selection_options(self) -> tuple[MethodOption, ...]:
        return ()

    def selection(self, budget: LayerBudget) -> Selection | None:
        return None


@dataclasses.dataclass(frozen=True)
class RocketKVStage2(Method):
    """Stage 2 alone, as published: the view keeps everything, and all compression is in what a step reads."""

    def profile(self, demand: Demand) -> BudgetProfile:
        page, dims = stage2_split(demand.context, demand.token_budget, demand.head_dim)
        tokens = min(demand.token_budget // 2, demand.context)
        options = sorted_options({"head_dims": dims})
        budget = LayerBudget(demand.context, selected_tokens=tokens, page_size=page, selection_options=options)
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    @property
    def selection_options(self) -> tuple[MethodOption, ...]:
        return HYBRID_OPTIONS

    def selection(self, budget: LayerBudget) -> Selection | None:
        return hybrid_tokens(budget)


def hybrid_tokens(budget: LayerBudget) -> HybridTokens:
    """The published stage 2 of a budget; a token budget is twice the tokens that are attended exactly."""
    tokens, options = budget.selected_tokens or 0, dict(budget.selection_options)
    return HybridTokens(tokens, int(options["head_dims"]), budget.page_size, dense_threshold=2 * tokens)


def paged(budget: LayerBudget, token_budget: int, least: int, page_sizes: Sequence[int] = PAGES) -> LayerBudget:
    """A budget whose stage 2 reads whole pages within a token budget: two pages' summaries cost as much as one token.

    The smallest page whose summaries take at most half of the traffic, if that leaves enough pages to read. Where no
    page does, the view is made smaller until the largest that can be read does.

    Args:
        least: entries that a view needs at any rate.
        page_sizes: to choose from, the smallest first.

    Raises:
        ValueError: the smaller view would have fewer, or the budget does not pay for `FEWEST_PAGES` of any size.
    """
    for page in page_sizes:
        summaries = math.ceil(math.ceil(budget.capacity / page) / 2)
        tokens = (token_budget - summaries) // page * page
        if 2 * summaries <= token_budget and tokens >= FEWEST_PAGES * page:
            return dataclasses.replace(budget, selected_tokens=tokens, page_size=page, selection_options=())
    page = max((page for page in page_sizes if 2 * FEWEST_PAGES * page <= token_budget), default=0)
    if not page:
        raise ValueError(
            f"token_budget={token_budget} must be at least {2 * FEWEST_PAGES * min(page_sizes)} for pages of "
            f"{min(page_sizes)} entries: raise it"
        )
    capacity = token_budget // 2 * 2 * page
    if capacity < least:
        raise ValueError(
            f"token_budget={token_budget} pays for the summaries of {capacity} entries, and {least} are needed for the "
            "window and the room for generated tokens: raise it, lower --headroom, or use rocketkv-faithful"
        )
    return dataclasses.replace(
        budget,
        capacity=capacity,
        selected_tokens=token_budget // 2 // page * page,
        page_size=page,
        selection_options=(),
    )
