"""Load or compute: how much of a stored prefix is worth its way to the device, by rates measured while serving.

A prompt's last blocks cost most to compute (they attend to all before them) and no more than others to load, but a
prefix must be loaded from its beginning, so the question is only how far. Never slower than computing is the aim.

An estimate of a tier forgives: it is a median, which one hiccup does not move; one good measurement clears a bad
history; and a tier that was passed over is probed every few seconds, by a load that no request waits for.
"""

import collections
import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence

FORGET = 0.98  # weight of older measurements, in the fit of what computing costs
CLIP = 4.0  # times the fit: more of one measurement is a pause of the machine, and not its rate
TRUSTED = 8  # measurements after which the fit clips
RECENT = 5  # measurements of a tier that its estimate is the median of
PROBE = 2.0  # seconds between two probes of a tier that is passed over
HALVES = 20.0  # seconds in which an estimate that nothing renews halves


@dataclasses.dataclass
class _Line:
    """Seconds of a block as a + b * index, by least squares over measurements that are slowly forgotten."""

    n: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    y: float = 0.0
    xy: float = 0.0
    count: int = 0

    def add(self, index: float | int, seconds: float) -> None:
        if self.count >= TRUSTED:
            seconds = min(seconds, CLIP * max(self.at(index), 1e-6))
        self.count += 1
        for name, value in (("n", 1.0), ("x", index), ("xx", index * index), ("y", seconds), ("xy", index * seconds)):
            setattr(self, name, getattr(self, name) * FORGET + value)

    def at(self, index: float | int) -> float:
        mean_x, mean_y = self.x / self.n, self.y / self.n
        spread = self.xx / self.n - mean_x**2
        slope = 0.0 if spread < 1e-9 else max((self.xy / self.n - mean_x * mean_y) / spread, 0.0)
        return max(mean_y + slope * (index - mean_x), 0.0)


@dataclasses.dataclass
class _TierRate:
    """Measured seconds a block of one tier, the newest last, and when the newest came."""

    seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=RECENT))
    measured: float = 0.0
    probed: float = 0.0
    best: float = float("inf")

    def add(self, seconds: float, now: float) -> None:
        if seconds < self.estimate / 2:  # what it could do just now it can do
            self.seconds.clear()
        self.seconds.append(seconds)
        self.measured, self.best = now, min(self.best, seconds)

    @property
    def estimate(self) -> float:
        """The median of the recent measurements; 0 before the first, so that an unknown tier is tried."""
        return statistics.median_low(self.seconds) if self.seconds else 0.0

    def at(self, now: float) -> float:
        """The estimate, which fades towards the best that was ever measured while nothing renews it."""
        faded = self.estimate * 0.5 ** (max(now - self.measured, 0.0) / HALVES)
        return max(faded, min(self.best, self.estimate))


class Planner:
    """Measured rates, and the choice that follows. Units are blocks of a prompt; safe to use from several threads.

    Args:
        clock: monotonic seconds, by which estimates age.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._mutex = threading.Lock()
        self._clock = clock
        self._compute = _Line()
        self._tiers: dict[str, _TierRate] = {}

    def computed(self, index: float | int, seconds: float) -> None:
        """A block at place `index` of a prompt took so long to compute."""
        with self._mutex:
            self._compute.add(index, seconds)

    def loaded(self, tier: str, seconds: float, blocks: float | int = 1) -> None:
        """So many blocks took so long to come from a tier to where the device can take them."""
        if blocks <= 0:
            return
        with self._mutex:
            self._tiers.setdefault(tier, _TierRate()).add(seconds / blocks, self._clock())

    def load_seconds(self, tier: str) -> float | None:
        """Seconds a block takes from a tier; None before the first was measured."""
        with self._mutex:
            rate = self._tiers.get(tier)
            return None if rate is None or not rate.seconds else rate.at(self._clock())

    def compute_seconds(self, index: float | int, blocks: int = 1) -> float | None:
        """Seconds that blocks from place `index` of a prompt on take to compute; None before one was measured."""
        with self._mutex:
            if not self._compute.n:
                return None
            return blocks * self._compute.at(index + (blocks - 1) / 2)  # the fit is a line

    def choose(self, tiers: Sequence[str], first: int = 0) -> int:
        """How many blocks to load, from place `first` of a prompt on; `tiers` says where each of them lies.

        A tier that was never measured counts as free: whoever loads asks again after the first block.
        """
        with self._mutex:
            if not self._compute.n:
                return len(tiers)
            now = self._clock()
            rates = {tier: self._tiers[tier].at(now) if tier in self._tiers else 0.0 for tier in set(tiers)}
            gain = best = 0.0
            chosen = 0
            for index, tier in enumerate(tiers):
                gain += self._compute.at(first + index) - rates[tier]
                if gain > best:
                    best, chosen = gain, index + 1
            return chosen

    def probe(self, tier: str) -> bool:
        """Whether a tier that was passed over should be measured now, by a load that nothing waits for.

        True at most once in `PROBE` seconds for each tier.
        """
        with self._mutex:
            rate, now = self._tiers.setdefault(tier, _TierRate()), self._clock()
            if now - max(rate.probed, rate.measured) < PROBE:
                return False
            rate.probed = now
            return True
