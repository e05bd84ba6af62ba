"""Daemon thread pool: tasks in order, and an end that nobody has to wait for.

`concurrent.futures` joins its threads when the interpreter exits, so one call that hangs keeps a process from ending.
These threads are daemons, and `close` waits for as long as it is told and no longer.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)
Task = Callable[[], Any]


class DaemonPool:
    """At most `threads` tasks at once, begun in the order in which they were submitted. Safe from any thread."""

    def __init__(self, threads: int, name: str) -> None:
        if threads < 1:
            raise ValueError(f"threads={threads}: a pool needs at least one")
        self._name, self._most = name, threads
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, task: Task) -> bool:
        """Has a thread run `task`; its exceptions are logged. False, and nothing is run, after `close`."""
        with self._changed:
            if self._closed:
                return False
            self._unfinished += 1
            if len(self._threads) < min(self._most, self._unfinished):
                thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put(task)
        return True

    def wait_idle(self, timeout: float) -> bool:
        """Whether every task that was submitted has ended within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout)

    def close(self, timeout: float) -> bool:
        """Drops the tasks that have not begun; returns whether the others end within `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            while True:
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    break
                if task is not None:
                    self._unfinished -= 1
            threads = list(self._threads)
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in threads)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                logger.exception("%s: a task failed", self._name)
            finally:
                del task  # and what it holds
                with self._changed:
                    self._unfinished -= 1
                    self._changed.notify_all()
