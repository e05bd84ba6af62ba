"""What is searched of RocketKV: for each group of layers its share of a step's traffic, its split, its pooling."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.space import Candidate, Space, grouped
from kvjax.search.stages import Stages, split

COORDINATES = 3  # of a group: logarithm of its share, the exponent's logit, the kernel's number less the middle


@dataclasses.dataclass(frozen=True)
class StageSpace:
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

    @property
    def _count(self) -> int:
        return -(-self.layers // self.unit_layers)

    @functools.cached_property
    def _traffic(self) -> Space:
        """How the traffic is shared. The least pays for the summaries of what a view needs anyway, and two pages."""
        needs = self.stages.window + self.stages.sinks + self.stages.headroom
        page = self.stages.page_size
        least = math.ceil(math.ceil(needs / page) / 2) + 3 * page
        if self.mean < least:
            raise ValueError(
                f"a token budget of {self.mean} is below the {least} that pages of {page} entries take beside a headroom "
                f"of {self.stages.headroom}: raise it, or lower the headroom"
            )
        return Space(self._count, self.mean, least, self.context)

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

    def decode(self, point: Float[np.ndarray, "N"]) -> Candidate:
        """The candidate at a point; all zeros are equal shares, an even split, and a middling kernel."""
        shares, logits, kernels = point.astype(np.float64).reshape(self._count, COORDINATES).T
        traffic = self._traffic.project(np.exp(np.clip(shares, -20, 20)))
        exponents = 1 / (1 + np.exp(-np.clip(logits, -20, 20)))
        last = len(self.stages.kernels) - 1
        numbers = np.clip(np.rint(np.clip(kernels, -9, 9) * 2 + last / 2), 0, last).astype(int)
        rows = [
            (*split(self.context, its, float(exponent), self.stages), int(number))
            for its, exponent, number in zip(traffic, exponents, numbers, strict=True)
        ]
        return tuple(value for layer in range(self.layers) for value in rows[layer // self.unit_layers])

    def settled(self, candidate: Int[np.ndarray, "L"]) -> Candidate:
        return tuple(int(value) for value in candidate)
