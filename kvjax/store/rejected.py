"""Rejected keys: a bounded memory of objects that were harmed, for tiers that nothing can be removed from."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

SECONDS = 600.0
CAPACITY = 65_536


class RejectedKeys:
    """Keys that count as missing for a while. Safe from any thread.

    Args:
        seconds: after which a key may be asked for again, as somebody may have mended the object.
        capacity: keys remembered at once; beyond it those that were rejected first are forgotten.
    """

    def __init__(
        self, seconds: float = SECONDS, capacity: int = CAPACITY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._capacity, self._clock = seconds, capacity, clock
        self._rejected: OrderedDict[str, float] = OrderedDict()  # when each key was, the oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            self._expire()
            return len(self._rejected)

    def __contains__(self, key: str) -> bool:
        with self._lock:
            self._expire()
            return key in self._rejected

    def add(self, key: str) -> None:
        """Remembers a key from now on."""
        with self._lock:
            self._rejected[key] = self._clock()
            self._rejected.move_to_end(key)
            self._expire()
            while len(self._rejected) > self._capacity:
                self._rejected.popitem(last=False)

    def _expire(self) -> None:
        now = self._clock()
        while self._rejected and now - next(iter(self._rejected.values())) >= self._seconds:
            self._rejected.popitem(last=False)
