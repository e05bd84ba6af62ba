"""Point: one measurement of `benchmarks.device`, with its prediction and the function that measures it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.plan.devices import Device

# Assumptions of predictions, made before anything has run: the share of the published bandwidth that a copy reaches,
# and of a copy's that other reads reach; the gap between two kernels, in seconds; and the share of the published
# arithmetic that products reach.
COPY = 0.9
KERNEL = 0.85
XLA = 0.7
GAP = 2e-6
PRODUCTS = 0.6


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the results.

    Attributes:
        name: unique among all.
        part: of the command.
        about: JSON values that distinguish it from its neighbours.
        nbytes: that it must move at least, by which its share of the bandwidth is counted.
        operations: additions and multiplications that it must do at least, where these may take longer.
        predicted: seconds, written down before it is measured.
        measure: returns "seconds", and other figures.
        unfit: the reason why it is not measured here; None if it is.
        order: 0 is measured before 1, whatever the part.
    """

    name: str
    part: str
    about: Mapping[str, Any]
    predicted: float
    measure: Callable[[], Mapping[str, Any]]
    nbytes: int = 0
    operations: float = 0.0
    unfit: str | None = None
    order: int = 1

    def row(self) -> dict[str, Any]:
        """As it is written before it is measured."""
        row = {"name": self.name, "part": self.part, **self.about, "bytes": self.nbytes}
        row |= {"operations": self.operations} if self.operations else {}
        row["predicted"] = self.predicted
        return row if self.unfit is None else row | {"skipped": self.unfit}


@dataclasses.dataclass(frozen=True)
class Guess:
    """Seconds that something should take: its bytes at a share of the bandwidth, and a gap for each kernel.

    Attributes:
        share: of what a copy reaches.
    """

    device: Device
    share: float = KERNEL

    def __call__(self, nbytes: float, kernels: float = 1, operations: float = 0.0) -> float:
        moving = nbytes / (self.device.bandwidth * COPY * self.share)
        return max(moving, operations / (self.device.flops * PRODUCTS)) + kernels * GAP
