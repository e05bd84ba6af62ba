"""A circuit breaker: after several failures in a row nobody asks for a while, then one asks for all.

closed ── `failures` in a row ──> open ── `pause` seconds ──> half-open (one probe) ── healthy ──> closed
                                   ^                                  │
                                   └────────────── failed ────────────┘
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A closed breaker has opened, after so many failures in a row."""

    failures: int


@dataclasses.dataclass(frozen=True)
class Closed:
    """A breaker has closed again, so many seconds after it opened; `refused` calls were not admitted meanwhile."""

    seconds: float
    refused: int


class Breaker:
    """Says who may ask and hears what came of it. Safe from any thread.

    Attributes:
        failures: how many in a row open it.
        pause: seconds during which an open breaker lets nobody ask.
    """

    def __init__(self, failures: int = 5, pause: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        if failures < 1 or pause < 0:
            raise ValueError(f"a breaker needs failures >= 1 and pause >= 0 s, not {failures} and {pause}")
        self.failures = failures
        self.pause = pause
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._opened: float | None = None  # when it opened last, or None while closed
        self._opened_first, self._refused = 0.0, 0  # since it was closed last
        self._probing = False
        self._round = 0  # a call that began before the state last changed has no say in the present one

    @property
    def state(self) -> State:
        with self._lock:
            if self._opened is None:
                return "closed"
            return "half-open" if self._probing or self._rested() else "open"

    def admit(self) -> int | None:
        """Whether one may ask now: a ticket to hand to `report`, exactly once, or None."""
        with self._lock:
            if self._opened is not None:
                if self._probing or not self._rested():
                    self._refused += 1
                    return None
                self._probing = True
                self._round += 1
            return self._round

    def report(self, ticket: int, healthy: bool | None) -> Opened | Closed | None:
        """What came of it: an answer, a failure, or None if nobody was asked after all.

        Returns whether this has opened or closed the breaker; a probe that fails leaves it open, which is no change.
        """
        with self._lock:
            if ticket != self._round:
                return None
            if healthy is None:
                self._probing = False
                return None
            return self._close() if healthy else self._count_failure()

    def _close(self) -> Closed | None:
        was_open = self._opened is not None
        self._in_a_row, self._opened, self._probing = 0, None, False
        return Closed(self._clock() - self._opened_first, self._refused) if was_open else None

    def _count_failure(self) -> Opened | None:
        self._in_a_row += 1
        if not self._probing and self._in_a_row < self.failures:
            return None
        failures, was_open = self._in_a_row, self._opened is not None
        self._in_a_row, self._opened, self._probing = 0, self._clock(), False
        self._round += 1
        if was_open:
            return None
        self._opened_first, self._refused = self._opened, 0
        return Opened(failures)

    def _rested(self) -> bool:
        return self._opened is not None and self._clock() - self._opened >= self.pause
