"""Background executor: one thread that copies KV to the host and gives it to the store, with bounded queues."""

import logging
import queue
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
Task = Callable[[], None]
QUEUED = 32  # tasks given by `put`: each holds a chunk of one layer on the device until it is done
OFFERED = 8  # tasks given by `offer`: each holds generated tokens in all layers


class BackgroundExecutor:
    """Runs tasks in the order in which they come; one that raises is logged, and what it would have stored is lost."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Task, threading.Semaphore] | None] = queue.SimpleQueue()
        self._queued, self._offered = threading.Semaphore(QUEUED), threading.Semaphore(OFFERED)
        self._thread = threading.Thread(target=self._run, name="kvjax-save", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        """Queues a task; waits while `QUEUED` others are not done."""
        self._queued.acquire()
        self._tasks.put((task, self._queued))

    def offer(self, make: Callable[[], Task]) -> bool:
        """Queues the task that `make` returns, or refuses while `OFFERED` others are not done: never waits."""
        if not self._offered.acquire(blocking=False):
            return False
        self._tasks.put((make(), self._offered))
        return True

    def settle(self, timeout: float) -> bool:
        """Whether every task that was queued before is done within `timeout` seconds."""
        end = time.monotonic() + timeout
        done = threading.Event()
        if not self._queued.acquire(timeout=timeout):
            return False
        self._tasks.put((done.set, self._queued))
        return done.wait(max(end - time.monotonic(), 0.0))

    def close(self, timeout: float) -> bool:
        """Ends the thread, after what is queued; returns whether that took less than `timeout` seconds."""
        self._tasks.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            task, places = entry
            try:
                task()
            except Exception:  # what is not stored is computed again
                logger.exception("saving KV failed")
            finally:
                del entry, task  # and the arrays that came with it
                places.release()
