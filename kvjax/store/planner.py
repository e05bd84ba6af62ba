"""Load or compute: how much of a stored prefix is worth its way to the device, by rates measured while serving.

A prompt's last chunks cost most to compute (they attend to all before them) and no more than others to load, but a
prefix must be loaded from its beginning, so the question is only how far. Never slower than computing is the aim; a
tier that lost is tried again once in a while, with little.
"""

import dataclasses
import threading
from collections.abc import Sequence

SMOOTHING = 0.2  # weight of the newest measurement
FORGET = 0.98  # of older ones, in the fit of what computing costs
TRIAL = 1  # chunks loaded from a tier that may have become faster
PATIENCE = 32  # choices against a tier before that


@dataclasses.dataclass
class _Line:
    """Seconds of a unit as a + b * index, by least squares over measurements that are slowly forgotten."""

    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0

    def add(self, index: int, seconds: float) -> None:
        for name, value in (("n", 1.0), ("x", index), ("xx", index * index), ("y", seconds), ("xy", index * seconds)):
            setattr(self, name, getattr(self, name) * FORGET + value)

    def at(self, index: int) -> float:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        spread = self.xx / self.n - mean_x**2
        slope = 0.0 if spread < 1e-9 else max((self.xy / self.n - mean_x * mean_y) / spread, 0.0)
        return max(mean_y + slope * (index - mean_x), 0.0)


class Planner:
    """Measured rates, and the choice that follows. Units are chunks of a prompt; safe to use from several threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._compute = _Line()
        self._load: dict[str, float] = {}  # seconds a unit, by tier
        self._passed: dict[str, int] = {}  # how often a tier was passed over since it was last tried

    def computed(self, index: int, seconds: float) -> None:
        """Chunk `index` of a prompt took so long to compute."""
        with self._mutex:
            self._compute.add(index, seconds)

    def loaded(self, tier: str, seconds: float, units: float = 1.0) -> None:
        """So many chunks took so long to come from a tier to where the device can take them."""
        if units <= 0:
            return
        with self._mutex:
            old = self._load.get(tier, seconds / units)
            self._load[tier] = old + SMOOTHING * (seconds / units - old)

    def load_seconds(self, tier: str) -> float | None:
        """Seconds a chunk takes from a tier; None before the first was measured."""
        with self._mutex:
            return self._load.get(tier)

    def compute_seconds(self, index: int) -> float | None:
        """Seconds that chunk `index` of a prompt takes to compute; None before the first was measured."""
        with self._mutex:
            return self._compute.at(index) if self._compute.n else None

    def choose(self, tiers: Sequence[str], first: int = 0) -> int:
        """How many chunks to load, from chunk `first` of a prompt on; `tiers` says where each lies, nearest first.

        A tier that was never measured counts as free: whoever loads asks again after the first chunk. One that was
        passed over `PATIENCE` times is tried with `TRIAL` chunks.
        """
        with self._mutex:
            if not self._compute.n:
                return len(tiers)
            gain = best = 0.0
            chosen = 0
            for index, tier in enumerate(tiers):
                gain += self._compute.at(first + index) - self._load.get(tier, 0.0)
                if gain > best:
                    best, chosen = gain, index + 1
            if chosen < len(tiers):
                tier = tiers[chosen]
                self._passed[tier] = self._passed.get(tier, 0) + 1
                if self._passed[tier] >= PATIENCE:
                    self._passed[tier] = 0
                    return chosen + TRIAL
            return chosen
