"""A circuit breaker: after several failures in a row nobody asks for a while, then one asks for all.

closed ── `failures` in a row ──> open ── `pause` seconds ──> half-open (one probe) ── healthy ──> closed
                                   ^                                  │
                                   └────────────── failed ────────────┘
"""

import threading
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]


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
        self._opened: float | None = None  # when, or None while closed
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
                    return None
                self._probing = True
                self._round += 1
            return self._round

    def report(self, ticket: int, healthy: bool | None) -> None:
        """What came of it: an answer, a failure, or None if nobody was asked after all."""
        with self._lock:
            if ticket != self._round:
                return
            if healthy is None:
                self._probing = False
            elif healthy:
                self._in_a_row, self._opened, self._probing = 0, None, False
            else:
                self._in_a_row += 1
                if self._probing or self._in_a_row >= self.failures:
                    self._in_a_row, self._opened, self._probing = 0, self._clock(), False
                    self._round += 1

    def _rested(self) -> bool:
        return self._opened is not None and self._clock() - self._opened >= self.pause
