"""The lock of a folder that several processes share: by `flock` on a file in it, and never waited for without an end.

A process that is stopped, or hangs in a system call, keeps what it has locked. So every wait has a deadline, and an
error names the process that holds the lock.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kvjax.store.tier import TierError

GLANCE = 0.5  # seconds after which a waiter looks whether the file is still the one that others lock


class _Waiter:
    """A thread that waits in `flock`, where waiters take turns, until it holds the lock of an open file.

    It cannot be stopped: when nobody wants the lock any more it lets go of it as soon as it comes.
    """

    def __init__(self, file: int) -> None:
        self._file = os.dup(file)  # of the same lock: it may be closed here, and stays open there
        self._changed = threading.Condition()
        self._ended, self._wanted = False, True
        self._error: OSError | None = None
        threading.Thread(target=self._run, name="kvjax-disk-lock", daemon=True).start()

    def wait(self, timeout: float) -> bool:
        """Whether the lock is held within `timeout` seconds. Raises OSError."""
        with self._changed:
            self._wanted = not self._ended or self._wanted
            self._changed.wait_for(lambda: self._ended, timeout)
            if not self._ended:
                self._wanted = False
                return False
            if self._error is not None:
                raise self._error
            return self._wanted

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._ended

    def _run(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            self._error = error
        with self._changed:
            if not self._wanted and self._error is None:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._ended = True
            os.close(self._file)
            self._changed.notify_all()


class FolderLock:
    """Keeps other threads and other processes out.

    Args:
        path: of the lock's file; made if it is not there.
        prepare: makes the folder that `path` is in. Called before the file is made, as well when it has gone since.
    """

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self._path, self._prepare = path, prepare
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._file: int | None = None
        self._waiter: _Waiter | None = None

    @contextlib.contextmanager
    def hold(self, seconds: float) -> Iterator[None]:
        """Holds the lock.

        Raises:
            TierError: another thread or process has held it for `seconds` ("timeout"), or it is closed ("refused").
            OSError: the file cannot be made or locked.
        """
        end = time.monotonic() + seconds
        if not self._turn.acquire(timeout=seconds):
            raise TierError("timeout", f"{self._path}: other threads have held the lock for {seconds:g} s")
        try:
            file = self._acquire(end, seconds)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            self._turn.release()

    def now(self) -> float:
        """Seconds by the clock that gives files their times, which may be another machine's. While it is held."""
        assert self._file is not None
        os.utime(self._file)
        return os.fstat(self._file).st_mtime

    def close(self, seconds: float) -> None:
        """Lets go of the file, when nobody in this process holds the lock. No call may follow.

        Raises:
            TierError: another thread holds it for longer than that ("timeout").
        """
        self._closed.set()
        if not self._turn.acquire(timeout=seconds):
            raise TierError("timeout", f"{self._path}: another thread has held the lock for {seconds:g} s")
        try:
            self._release_file()
        finally:
            self._turn.release()

    def _acquire(self, end: float, seconds: float) -> int:
        """Locks the file that is at the path, which somebody may have replaced."""
        while True:
            if self._closed.is_set():
                raise TierError("refused", f"{self._path}: closed")
            if self._file is not None and not self._is_at_path(self._file):
                self._release_file()
            if self._file is None:
                self._prepare()
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if self._wait(self._file, max(end - time.monotonic(), 0.0)):
                if self._is_at_path(self._file):
                    return self._file
            elif time.monotonic() >= end:
                raise TierError("timeout", self._held_by(self._file, seconds))

    def _wait(self, file: int, timeout: float) -> bool:
        """Whether it is locked in time; looks no longer than `GLANCE` seconds, for it may be another file by then."""
        if self._waiter is None or self._waiter.ended:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            self._waiter = _Waiter(file)
        try:
            held = self._waiter.wait(min(timeout, GLANCE))
        except OSError:
            self._waiter = None
            raise
        if held:
            self._waiter = None
        return held

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _release_file(self) -> None:
        self._waiter = None
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _held_by(self, file: int, seconds: float) -> str:
        pid = _holder(os.fstat(file))
        if pid is None:
            return f"{self._path}: another process has held the lock for {seconds:g} s: end it, or use another folder"
        stopped = f"is stopped and has (kill -CONT {pid} continues it)" if _is_stopped(pid) else "has"
        return f"{self._path}: process {pid} {stopped} held the lock for {seconds:g} s: end it, or use another folder"


def _holder(stat: os.stat_result) -> int | None:
    """The process that holds a file's lock, as far as this machine's kernel says."""
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE 1234 fe:00:5678 0 EOF, and "->" before those who wait
            if fields[1] == "FLOCK" and fields[5] == device:
                return int(fields[4])
    return None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    return False
