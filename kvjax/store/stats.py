"""Store statistics: counts by tier, for metrics, logs and the page."""

import collections
import dataclasses
import threading
from collections.abc import Mapping

HOST = "host"  # the name of host memory among the tiers


@dataclasses.dataclass(frozen=True)
class TierStats:
    """Since the start, but for what it holds now. Bytes, and seconds of all threads together.

    Attributes:
        hits: blocks that requests took from here.
        checked: layers of found blocks that were computed again and compared, at the rate of `StoreConfig.verify_hits`.
        errors: by reason: those of `TierError`, "corrupt", "parent" for a block whose parent could not be written,
            "no place" for a request that got no host memory in its turn, "verify" for what was not the same then.
        breaker: "closed", "open" or "half-open"; "" for a tier without one.
    """

    blocks: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0
    hits: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    written: int = 0
    checked: int = 0
    evictions: int = 0
    errors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    breaker: str = ""


class Counters:
    """Counts by tier and name, from any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def add(self, tier: str, name: str, count: int = 1) -> None:
        with self._mutex:
            self._counts[tier, name] += count

    def took(self, tier: str, seconds: float) -> None:
        with self._mutex:
            self._seconds[tier] += seconds

    def of(self, tier: str) -> tuple[dict[str, int], float]:
        """The counts of a tier by name, and its seconds of loading."""
        with self._mutex:
            return {name: count for (owner, name), count in self._counts.items() if owner == tier}, self._seconds[tier]
