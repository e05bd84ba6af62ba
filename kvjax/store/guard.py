"""Guarded tier: deadlines, few attempts and a circuit breaker around a tier that may do neither.

The engine's threads call `Guarded`; each call of the tier itself runs in a thread of `Workers`. A call that was given
up may go on for minutes and use its memory. So bytes pass through buffers of the guard's own, or, where a copy would be
most of the time that a call takes, the error says when the memory is free again.
"""

import collections
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvjax.store.breaker import Breaker, Closed, Opened, State
from kvjax.store.tier import Reason, Stored, Tier, TierError
from kvjax.store.workers import BusyError, LateError, Workers

logger = logging.getLogger(__name__)

# The tier's fault, which may pass. Whoever answers "refused", "full" or "length" is in good health.
FAILURES: frozenset[Reason] = frozenset({"timeout", "io"})
MOST_ATTEMPTS = 3


class Guarded(Tier):
    """The tier given, within `deadline` seconds a call. Safe from any thread.

    Attributes:
        deadline: seconds for one call, its attempts and the pauses between them.
        scan_deadline: seconds for one whole scan.
    """

    def __init__(
        self,
        tier: Tier,
        deadline: float = 1.0,
        *,
        attempts: int = MOST_ATTEMPTS,
        threads: int = 4,
        failures: int = 5,
        pause: float = 5.0,
        backoff: float = 0.02,
        copies: bool = True,
        scan_deadline: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wraps `tier`, which is closed with the guard.

        Args:
            attempts: how often a read is tried, 1 to 3; what changes the tier is tried once.
            threads: calls at once; the others wait, within their deadline.
            failures: failed calls in a row that open the breaker.
            pause: seconds until an open breaker lets one call through.
            backoff: seconds before the second attempt, about twice that before the third.
            copies: whether bytes pass through buffers of the guard's own. Without them a call that is given up may
                still use the caller's memory: its TierError says by `finished` when it no longer does.
            clock: what the breaker measures its pause by; deadlines are in real time.
        """
        if not 1 <= attempts <= MOST_ATTEMPTS:
            raise ValueError(f"attempts must be 1 to {MOST_ATTEMPTS}, not {attempts}")
        if min(deadline, scan_deadline) <= 0 or backoff < 0:
            raise ValueError(f"deadlines must be above 0 s and backoff no less: {deadline}, {scan_deadline}, {backoff}")
        self.name = tier.name
        self.read_only = tier.read_only
        self.evicts = tier.evicts
        self.deadline = deadline
        self.scan_deadline = scan_deadline
        self._tier = tier
        self._attempts = attempts
        self._copies = copies
        self._backoff = backoff
        self._breaker = Breaker(failures, pause, clock)
        self._workers = Workers(threads, f"kvjax-{tier.name}")
        self._buffers = _Buffers(threads)
        self._lock = threading.Lock()
        self._errors: collections.Counter[Reason] = collections.Counter()
        self._retries = 0
        self._closed = False

    @property
    def state(self) -> State:
        """Of the breaker; "half-open" when the next call will be let through to see."""
        return self._breaker.state

    @property
    def errors(self) -> dict[Reason, int]:
        """Calls that failed, by reason, since the start."""
        with self._lock:
            return dict(self._errors)

    @property
    def retries(self) -> int:
        """Attempts after a first one, since the start."""
        with self._lock:
            return self._retries

    @property
    def lost(self) -> int:
        """Threads that hang in calls which were given up."""
        return self._workers.lost

    def read(self, key: str, into: memoryview) -> bool:
        if not self._copies:
            return self._ask(lambda _: self._tier.read(key, into), self._attempts)

        def work(_: threading.Event) -> tuple[bool, np.ndarray]:
            buffer = self._buffers.take(into.nbytes)
            return self._tier.read(key, memoryview(buffer)[: into.nbytes]), buffer

        found, buffer = self._ask(work, self._attempts)
        if found:  # np.copyto lets other threads run, which into[:] = does not
            np.copyto(np.asarray(into.cast("B")), buffer[: into.nbytes])
        self._buffers.put(buffer)  # not after an error: then a buffer may still be written to, and is left to it
        return found

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        def work(given_up: threading.Event) -> np.ndarray:
            buffer = self._buffers.take(blob.nbytes)
            np.copyto(buffer[: blob.nbytes], np.asarray(blob.cast("B")))
            if given_up.is_set():  # while it was copied: the blob may have become another one
                raise TierError("timeout", "given up before it began")
            self._tier.write(key, memoryview(buffer)[: blob.nbytes].toreadonly(), parent)
            return buffer

        self._refuse_if_read_only("write")
        if not self._copies:
            self._ask(lambda _: self._tier.write(key, blob, parent))
            return
        self._buffers.put(self._ask(work))

    def contains(self, key: str) -> bool:
        return self._ask(lambda _: self._tier.contains(key), self._attempts)

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        return self._ask(lambda _: self._tier.contains_many(keys), self._attempts)

    def touch(self, keys: Sequence[str]) -> list[bool]:
        return self._ask(lambda _: self._tier.touch(keys))

    def pin(self, keys: Sequence[str]) -> list[bool]:
        self._refuse_if_read_only("pin")
        return self._ask(lambda _: self._tier.pin(keys))

    def unpin(self, keys: Sequence[str]) -> None:
        self._refuse_if_read_only("unpin")
        self._ask(lambda _: self._tier.unpin(keys))

    def delete(self, key: str) -> None:
        self._refuse_if_read_only("delete")
        self._ask(lambda _: self._tier.delete(key))

    def reject(self, key: str) -> None:
        self._ask(lambda _: self._tier.reject(key))

    def peek(self, key: str, nbytes: int) -> bytes | None:
        return self._ask(lambda _: self._tier.peek(key, nbytes), self._attempts)

    def scan(self) -> Iterator[Stored]:
        """Everything at once, within `scan_deadline`: an iterator has no one call to put a deadline on."""

        def work(given_up: threading.Event) -> list[Stored]:
            found = []
            for stored in self._tier.scan():
                if given_up.is_set():
                    break
                found.append(stored)
            return found

        return iter(self._ask(work, seconds=self.scan_deadline))

    def held(self) -> dict[str, Any]:
        """What the tier knows of its state, and the breaker's."""
        return self._tier.held() | {"breaker": self.state}

    def close(self) -> None:
        """Closes the tier; one that does not let itself be closed within the deadline is left as it is."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            Workers(1, f"kvjax-{self.name}-close").run(lambda _: self._tier.close(), self.deadline)
        except LateError:
            self._failed(TierError("timeout", ""))
        except Exception:
            self._failed(TierError("io", ""))

    def _ask(self, work: Callable[[threading.Event], Any], attempts: int = 1, seconds: float | None = None) -> Any:
        """What `work` returns, if the breaker lets it through and it ends in time."""
        if self._closed:
            raise self._failed(TierError("refused", f"{self.name}: closed"))
        ticket = self._breaker.admit()
        if ticket is None:
            raise self._failed(TierError("breaker", f"{self.name}: not asked for a while, its calls failed"))
        seconds = seconds or self.deadline
        end = time.monotonic() + seconds
        healthy: bool | None = None
        failure = TierError("timeout", f"{self.name}: no answer within {seconds:g} s")
        try:
            result = self._workers.run(lambda given_up: self._attempt(work, attempts, end, given_up), seconds)
            healthy = True
            return result
        except TierError as error:
            healthy, failure = error.reason not in FAILURES, TierError(error.reason, str(error))
            self._failed(error)
            raise
        except LateError as late:
            healthy = False
            failure.finished = None if self._copies else late.finished
            raise self._failed(failure) from None
        except BusyError as busy:
            reason = "breaker" if busy.lost else "timeout"
            raise self._failed(TierError(reason, f"{self.name}: {busy}, {self._workers.threads} of them")) from None
        finally:
            self._log(self._breaker.report(ticket, healthy), failure)

    def _log(self, change: Opened | Closed | None, failure: TierError) -> None:
        """One line when the breaker opens and one when it closes, however many calls fail in between."""
        match change:
            case Opened(failures):
                logger.warning(
                    "the %s tier is left alone: %d calls in a row failed (%s: %.300s); "
                    "it is tried again every %g s, and meanwhile what it holds is computed",
                    self.name, failures, failure.reason, failure, self._breaker.pause,
                )  # fmt: skip
            case Closed(seconds, refused):
                logger.info(
                    "the %s tier answers again after %.1f s, in which %d calls were refused",
                    self.name, seconds, refused,
                )  # fmt: skip

    def _attempt(
        self, work: Callable[[threading.Event], Any], attempts: int, end: float, given_up: threading.Event
    ) -> Any:
        for attempt in range(1, attempts + 1):
            try:
                return work(given_up)
            except TierError as error:
                failure = error
            except Exception as error:  # the tier broke its contract; the caller's way on is the same
                failure = TierError("io", f"{self.name}: {type(error).__name__}: {error}")
                failure.__cause__ = error
            pause = self._backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            last = attempt == attempts or failure.reason not in FAILURES
            if last or time.monotonic() + pause >= end or given_up.wait(pause):
                try:
                    raise failure
                finally:
                    del failure  # it knows this frame: a ring that would keep buffers alive
            with self._lock:
                self._retries += 1
        raise AssertionError("attempts is at least one")

    def _refuse_if_read_only(self, what: str) -> None:
        if self.read_only:
            raise self._failed(TierError("refused", f"{self.name}: read-only, no {what}"))

    def _failed(self, error: TierError) -> TierError:
        with self._lock:
            self._errors[error.reason] += 1
        return error


class _Buffers:
    """Memory for objects in transit, kept from call to call: fresh pages cost more than the copy."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> np.ndarray:
        with self._lock:
            for index, buffer in enumerate(self._free):
                if buffer.nbytes >= nbytes:
                    return self._free.pop(index)
        return np.empty(nbytes, np.uint8)

    def put(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._free.append(buffer)
            self._free.sort(key=lambda free: free.nbytes)  # the smallest that is large enough is taken first
            if len(self._free) > self._most:
                self._free.pop(0)
