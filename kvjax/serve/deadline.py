"""Exit deadline: the moment at which a process that was told to end does, whatever its threads wait for.

    first signal ── ExitDeadline(seconds) ──> timer thread ── at the deadline ──> a warning, then os._exit(status)

A thread that hangs in a system call, on a device or in a lock cannot be stopped from within, and Python waits for some
kinds of threads when it ends. The timer waits for nothing.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("kvjax.serve")
LAST_WORDS_SECONDS = 0.1  # for the warning: a log that hangs keeps nothing from ending either


class ExitDeadline:
    """Ends the process `seconds` from now, unless it is cancelled.

    Args:
        status: gives the exit status at that time.
    """

    def __init__(self, seconds: float, status: Callable[[], int]) -> None:
        self._end = time.monotonic() + seconds
        self._status = status
        self._cancelled = threading.Event()
        threading.Thread(target=self._run, args=(seconds,), name="kvjax-deadline", daemon=True).start()

    @property
    def left(self) -> float:
        """Seconds until the process ends; 0 once they are over."""
        return max(self._end - time.monotonic(), 0.0)

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(self, seconds: float) -> None:
        if not self._cancelled.wait(seconds):
            leave(self._status(), f"not stopped after {seconds:g} s")


def leave(status: int, reason: str) -> None:
    """Ends the process at once, after a warning that names the threads left behind."""
    warning = threading.Thread(target=_warn, args=(reason,), daemon=True)
    warning.start()
    warning.join(LAST_WORDS_SECONDS)
    os._exit(status)


def _warn(reason: str) -> None:
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("kvjax-")}
    left = sorted(names - {"kvjax-deadline"})
    logger.warning("%s: ending all the same%s", reason, f", without {', '.join(left)}" if left else "")
