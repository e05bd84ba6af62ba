"""Background executor: one thread that copies KV to the host and gives it to the store, with bounded queues."""

import logging
import queue
import threading
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

    def settle(self) -> None:
        """Waits until every task that was queued before is done."""
        done = threading.Event()
        self.put(done.set)
        done.wait()

    def close(self) -> None:
        """Ends the thread, after what is queued."""
        self._tasks.put(None)
        self._thread.join()

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
