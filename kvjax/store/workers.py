"""Threads for calls that may never return: the caller waits so long and no longer.

    caller ── run(work, seconds) ──> a thread of the call's own ── work(given_up) ──> its result
       └─ at the deadline: `given_up` is set, LateError is raised, and nobody looks at the result any more

A thread cannot be stopped, so one that hangs is lost until it returns. There are only so many: when all are
lost the next caller is told at once. They are daemons, for a process must be able to end all the same.
"""

import threading
import time
from collections.abc import Callable
from typing import Any


class LateError(Exception):
    """The work was not done in time; it may be going on.

    Attributes:
        finished: set once it has ended after all.
    """

    def __init__(self, finished: threading.Event) -> None:
        super().__init__("not done in time")
        self.finished = finished


class BusyError(Exception):
    """No thread was to be had, so the work never began.

    Attributes:
        lost: whether that is because every thread hangs in work that was given up.
    """

    def __init__(self, lost: bool) -> None:
        super().__init__("all threads hang" if lost else "all threads are busy")
        self.lost = lost


class _Call:
    def __init__(self, work: Callable[[threading.Event], Any]) -> None:
        self.work = work
        self.done = threading.Event()
        self.given_up = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Workers:
    """At most `threads` calls at once, each with a deadline. Safe from any thread."""

    def __init__(self, threads: int, name: str) -> None:
        if threads < 1:
            raise ValueError(f"workers need at least one thread, not {threads}")
        self.threads = threads
        self._name = name
        self._running = 0
        self._lost = 0
        self._changed = threading.Condition()

    @property
    def lost(self) -> int:
        """Threads that still hang in work that was given up."""
        with self._changed:
            return self._lost

    def run(self, work: Callable[[threading.Event], Any], seconds: float) -> Any:
        """What `work` returns or raises. It gets an event that is set once nobody waits for it any more.

        Raises:
            LateError: `seconds` are over.
            BusyError: they are over and no thread became free, or none will.
        """
        end = time.monotonic() + seconds
        call = _Call(work)
        with self._changed:
            while self._running >= self.threads:
                if self._lost >= self.threads or not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise BusyError(self._lost >= self.threads)
            self._running += 1
        try:
            self._start(call)
            call.done.wait(max(0.0, end - time.monotonic()))
        finally:  # an interrupted caller gives up too
            late = self._give_up(call)
        if late:
            raise LateError(call.done)
        try:
            if call.error is not None:
                raise call.error
            return call.result
        finally:
            del call  # its error knows this frame: a ring that would keep large buffers alive

    def _start(self, call: _Call) -> None:
        try:
            threading.Thread(target=self._serve, args=(call,), name=self._name, daemon=True).start()
        except RuntimeError as error:  # the process has no thread left
            self._leave(call)
            raise BusyError(lost=False) from error

    def _serve(self, call: _Call) -> None:
        try:
            call.result = call.work(call.given_up)
        except BaseException as error:
            call.error = error
        finally:
            self._leave(call)

    def _leave(self, call: _Call) -> None:
        with self._changed:
            self._running -= 1
            if call.given_up.is_set():
                self._lost -= 1
            call.done.set()
            self._changed.notify()

    def _give_up(self, call: _Call) -> bool:
        """Whether the call is not done and is now given up: either its caller or its thread comes first, never both."""
        with self._changed:
            if call.done.is_set():
                return False
            call.given_up.set()
            self._lost += 1
            self._changed.notify_all()  # those who wait for a thread may now wait for nothing
            return True
