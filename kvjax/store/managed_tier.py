"""Managed tier: one tier below host memory with the threads, counters and health that the store keeps for it.

Each tier has threads of its own for look-ups, loads and writes, so that a tier that hangs keeps none of another's.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.store.pool import DaemonPool
from kvjax.store.stats import Counters
from kvjax.store.tier import Reason, Tier, TierError

logger = logging.getLogger(__name__)
LOADS, WRITES = 4, 2  # threads of each tier
WINDOW = 8  # a look-up asks for so many times as many blocks each time, while all were there
QUIET: frozenset[Reason] = frozenset({"length", "breaker"})  # of one object; of calls that were never made
CALM = 10.0  # seconds between two warnings of one tier


class ManagedTier:
    """A tier, by a name that no other tier of the store has.

    Attributes:
        writable: whether blocks are written to it.
        ordered: whether it evicts by last use, so that uses in host memory are passed on to it.
    """

    def __init__(self, tier: Tier, name: str, counters: Counters) -> None:
        self.tier, self.name = tier, name
        self.writable, self.ordered = not tier.read_only, tier.evicts and not tier.read_only
        self.lookups = DaemonPool(1, f"kvjax-find-{name}")
        self.loads = DaemonPool(LOADS, f"kvjax-load-{name}")
        self.writes = DaemonPool(WRITES, f"kvjax-write-{name}")
        self._counters = counters
        self._health = TierHealth(name)

    def extent(self, keys: Sequence[str], cancelled: Callable[[], bool]) -> int:
        """How many of these keys, from the first on, the tier holds without a gap. Few round trips; never raises."""
        count, window = 0, 1
        while count < len(keys) and not cancelled():
            batch = keys[count : count + window]
            held = self.call(lambda batch=batch: self.tier.contains_many(batch), [False] * len(batch))
            run = next((index for index, there in enumerate(held) if not there), len(held))
            count += run
            if run < len(batch):
                break
            window *= WINDOW
        return count

    def call[T](self, work: Callable[[], T], otherwise: T) -> T:
        """What `work` returns; `otherwise`, counted and logged once, where the tier fails."""
        try:
            result = work()
        except TierError as error:
            self.failed(error)
            return otherwise
        except Exception as error:  # the tier broke its contract; the way on is the same
            logger.exception("the %s tier raised what no tier may", self.name)
            self.failed(TierError("io", repr(error)))
            return otherwise
        self._health.works()
        return result

    @property
    def failing(self) -> bool:
        """Whether its last call failed."""
        return self._health.failing

    def succeeded(self) -> None:
        self._health.works()

    def loaded(self, seconds: float) -> None:
        """It gave a block, which took so long."""
        self._counters.took(self.name, seconds)
        self.count("loaded")
        self._health.works()

    def failed(self, error: TierError) -> None:
        self.count(f"error {error.reason}")
        if error.reason not in QUIET:
            self._health.fails(error)

    def count(self, what: str, number: int = 1) -> None:
        self._counters.add(self.name, what, number)

    def held(self) -> dict[str, Any]:
        """The tier's own account of itself; {} while it cannot give one."""
        return self.tier.held()

    def end_threads(self, timeout: float) -> bool:
        """Drops what they have not begun; returns whether they end within about `timeout` seconds."""
        end = time.monotonic() + timeout
        ended = True
        for pool in (self.lookups, self.loads, self.writes):
            ended &= pool.close(max(end - time.monotonic(), 0.0))
        return ended

    def close(self, timeout: float) -> bool:
        """Ends its threads and the tier; returns whether all has ended within about `timeout` seconds."""
        end = time.monotonic() + timeout
        ended = self.end_threads(timeout)
        closing = DaemonPool(1, f"kvjax-close-{self.name}")
        closing.submit(lambda: self.call(self.tier.close, None))
        return closing.wait_idle(max(end - time.monotonic(), 0.1)) and ended


class TierHealth:
    """One line in the log when a tier starts to fail, and one when it works again. Safe from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._mutex = threading.Lock()
        self._since: float | None = None  # when it began to fail; None while it works
        self._failures = 0
        self._warned, self._announced = -CALM, False

    @property
    def failing(self) -> bool:
        with self._mutex:
            return self._since is not None

    def fails(self, error: TierError) -> None:
        now = time.monotonic()
        with self._mutex:
            self._failures += 1
            if self._since is not None:
                return
            self._since, self._announced = now, now - self._warned >= CALM
            if not self._announced:
                return
            self._warned = now
        logger.warning("the %s tier fails (%s): %s; requests go on without it", self._name, error.reason, error)

    def works(self) -> None:
        if self._since is None:  # nearly always, and a race costs nothing
            return
        with self._mutex:
            if self._since is None:
                return
            seconds, failures, announced = time.monotonic() - self._since, self._failures, self._announced
            self._since, self._failures = None, 0
        if announced:
            logger.info("the %s tier works again after %.1f s and %d failed calls", self._name, seconds, failures)
