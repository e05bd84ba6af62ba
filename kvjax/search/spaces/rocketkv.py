"""RocketKV's space: for each two layers their share of a step's traffic, its split between the stages, and pooling."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax.budget import LayerBudget
from kvjax.search.spaces.space import Candidate, EvictionSettings, SearchSpace, grouped
from kvjax.search.spaces.tokens import TokenSpace

EVERYTHING = 1 << 20  # tokens that a step reads: more than a view holds
COORDINATES = 3  # of a group: logarithm of its share, the exponent's logit, the kernel's number less the middle


@dataclasses.dataclass(frozen=True)
class Stages:
    """The settings of both stages that all candidates share; static.

    Attributes:
        window, sinks: of stage 1.
        kernels: the widths of max-pooling that a candidate chooses from by number.
        page_size: entries of a page.
        headroom: entries of a served view that stay free for generated tokens.
    """

    window: int = 8
    sinks: int = 4
    kernels: tuple[int, ...] = (1, 7, 21, 63)
    page_size: int = 4
    headroom: int = 128

    def dense_threshold(self, max_retained: Any, tokens: Any) -> Any:
        """Entries up to which a served view of so many kept and read tokens is read as a whole."""
        pages = -(-(max_retained + self.headroom) // self.page_size)
        return tokens + -(-pages // 2)


@dataclasses.dataclass(frozen=True)
class StageSpace(SearchSpace):
    """Candidates whose decode steps read as much: three numbers a layer, alike within a group of layers.

    RocketKV gives every layer the same traffic, takes the exponent `0.2 + 0.06 log2(c)` of its compression c for stage
    1 (arXiv 2502.14051), and pools over 63 tokens; here all three are searched.

    Attributes:
        layers: of the model.
        mean: KV pairs' worth of traffic a layer, kv head and step on average: the token budget.
        context: most tokens of a sequence.
        stages: what candidates share; the numbers of its kernels are what they name.
        unit_layers: layers that share their numbers; they are prefilled together.
        group_layers: layers whose numbers are searched together.
    """

    shares_tokens: ClassVar[bool] = False
    layers: int
    mean: int
    context: int
    stages: Stages
    unit_layers: int = 2
    group_layers: int = 8

    def __post_init__(self) -> None:
        if self.unit_layers < 1 or self.group_layers % self.unit_layers:
            raise ValueError(
                f"group_layers={self.group_layers} must be a multiple of unit_layers={self.unit_layers}, for layers "
                "that share their numbers are searched together"
            )
        self._traffic.project(np.zeros(self._count))

    @classmethod
    def of(
        cls, *, layers: int, kv_heads: int, longest: int, mean: int, group_layers: int, eviction: EvictionSettings
    ) -> "StageSpace":
        del kv_heads
        stages = Stages(eviction.window, eviction.sinks, headroom=eviction.headroom)
        return cls(layers, mean, longest + eviction.headroom, stages, group_layers=group_layers)

    @property
    def _count(self) -> int:
        return -(-self.layers // self.unit_layers)

    @functools.cached_property
    def _traffic(self) -> TokenSpace:
        """How the traffic is shared. The least pays for the summaries of what a view needs anyway, and two pages."""
        needs = self.stages.window + self.stages.sinks + self.stages.headroom
        page = self.stages.page_size
        least = math.ceil(math.ceil(needs / page) / 2) + 3 * page
        if self.mean < least:
            raise ValueError(
                f"a token budget of {self.mean} is below the {least} that pages of {page} entries take beside a "
                f"headroom of {self.stages.headroom}: raise it, or lower the headroom"
            )
        return TokenSpace(self._count, self.mean, least, self.context)

    @property
    def units(self) -> int:
        return 3 * self.layers

    @property
    def dims(self) -> int:
        return COORDINATES * self._count

    @property
    def groups(self) -> tuple[range, ...]:
        return grouped(self.dims, COORDINATES * self.group_layers // self.unit_layers)

    @property
    def uniform(self) -> Candidate:
        """RocketKV's own numbers in every layer."""
        exponent = min(0.2 + 0.06 * math.log2(max(self.context / self.mean, 1.0)), 0.8)
        retained, read = split(self.context, self.mean, exponent, self.stages)
        return (retained, read, len(self.stages.kernels) - 1) * self.layers

    @property
    def full(self) -> Candidate:
        return (self.context, EVERYTHING, 0) * self.layers

    def decode(self, point: Float[np.ndarray, "N"]) -> Candidate:
        """The candidate at a point; all zeros are equal shares, an even split, and a middling kernel."""
        shares, logits, kernels = point.astype(np.float64).reshape(self._count, COORDINATES).T
        traffic = self._traffic.project(np.exp(np.clip(shares, -20, 20)))
        exponents = 1 / (1 + np.exp(-np.clip(logits, -20, 20)))
        last = len(self.stages.kernels) - 1
        numbers = np.clip(np.rint(np.clip(kernels, -9, 9) * 2 + last / 2), 0, last).astype(int)
        rows = [
            (*split(self.context, share, float(exponent), self.stages), int(number))
            for share, exponent, number in zip(traffic, exponents, numbers, strict=True)
        ]
        return tuple(value for layer in range(self.layers) for value in rows[layer // self.unit_layers])

    def settled(self, candidate: Int[np.ndarray, "L"]) -> Candidate:
        return tuple(int(value) for value in candidate)

    def tokens(self, candidate: Candidate) -> tuple[int, ...]:
        return candidate[::3]

    def cost(self, candidate: Candidate) -> float:
        """What a step reads, which is the token budget for every candidate."""
        del candidate
        return float(self.mean)

    def affordable(self, candidates: Int[np.ndarray, "P N"]) -> Bool[np.ndarray, "P"]:
        return np.ones(len(candidates), bool)

    def budgets(self, candidate: Candidate, eviction: EvictionSettings) -> list[LayerBudget]:
        return [
            LayerBudget.selecting(
                retained + eviction.headroom,
                observation_window=eviction.window,
                pooling_kernel=self.stages.kernels[kernel],
                sinks=eviction.sinks,
                selected_tokens=read,
                page_size=self.stages.page_size,
            )
            for retained, read, kernel in np.reshape(candidate, (self.layers, 3)).tolist()
        ]


def split(context: int, traffic: int, exponent: float, stages: Stages) -> tuple[int, int]:
    """Tokens kept and tokens read of one layer whose steps read `traffic` tokens' worth, by RocketKV's exponent.

    Stage 1 takes `(context / traffic) ** exponent` of the compression; the pages' summaries are paid for out of the
    traffic, two pages for one token, and what is left is read exactly, at least two pages.

    Raises:
        ValueError: the traffic pays for no page.
    """
    page = stages.page_size
    if traffic < 2 * page + 1:
        raise ValueError(f"traffic={traffic} pays for fewer than two pages of {page} entries: raise it")
    retained = math.floor(context / max(context / traffic, 1.0) ** exponent)
    most = 2 * (traffic - 2 * page) * page  # entries whose summaries leave two pages to read
    capacity = max(min(retained, most, context), stages.window + stages.sinks + stages.headroom)
    summaries = math.ceil(math.ceil(capacity / page) / 2)
    tokens = (traffic - summaries) // page * page
    if tokens < 2 * page:
        raise ValueError(
            f"traffic={traffic} does not pay for the summaries of {capacity} entries and two pages: raise it, or lower "
            f"headroom={stages.headroom}"
        )
    return capacity - stages.headroom, tokens
