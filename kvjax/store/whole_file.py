"""A file that is whole or not there: written beside its place, then renamed.

It is written past the operating system's page cache where that is possible. What was written lately is in the host tier
anyway, so a second copy would only cost memory and, on cores that may have to compute, the time to fill it.

    ab/abcdef.PID.N.__lock      of its full size from the beginning, and locked by its writer: `remove_if_dead`
"""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
from pathlib import Path

import numpy as np

from kvjax.store.block import PAGE
from kvjax.store.tier import TierError

TEMPORARY = ".__lock"  # how the name of a file ends that is being written
DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux


class PartialFile:
    """A file on its way to `path`, that only its owner may read. Leaving it as a context removes what is not in place.

    Args:
        nbytes: of the whole file; whoever lists the folder sees them from now on.

    Attributes:
        temporary: where it is until `commit`.

    Raises:
        OSError: by every method, and unless `sync_name` raises it, the file is not in its place.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self._placed = path, False
        for number in itertools.count():  # another writer, also of another machine, may be at the same file
            self.temporary = path.with_name(f"{path.name}.{os.getpid()}.{number}{TEMPORARY}")
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._file = os.open(self.temporary, flags, 0o600)
                break
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, nbytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fill(self, blob: memoryview, *, sync: bool) -> None:
        """Writes all bytes.

        Args:
            blob: where it begins at a whole page of memory it is not copied.
            sync: whether they are on the medium when this returns.
        """
        _fill(self._file, blob)
        if sync:
            os.fsync(self._file)

    def set_attribute(self, name: str, value: bytes) -> None:
        """Sets an extended attribute, where the file system knows any and takes no space for it."""
        with contextlib.suppress(OSError, AttributeError):
            before = os.fstat(self._file).st_blocks
            os.setxattr(self._file, name, value)
            if os.fstat(self._file).st_blocks > before:
                os.removexattr(self._file, name)

    def commit(self) -> None:
        """Moves it to its place. A folder that is there is no file of ours: it gets another name."""
        try:
            os.rename(self.temporary, self.path)
        except IsADirectoryError:
            os.rename(self.path, self.temporary.with_suffix(".folder"))
            os.rename(self.temporary, self.path)
        self._placed = True

    def sync_name(self) -> None:
        """Waits until the name is on the medium too."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Ends the writing; a file that is not in its place is gone."""
        try:
            if not self._placed:
                self.temporary.unlink(missing_ok=True)
        finally:
            os.close(self._file)


def read_whole(path: Path, into: memoryview) -> bool:
    """Reads a file that is exactly as long as `into`, and gives it the time of now; returns whether it is there.

    Raises:
        TierError: it is longer or shorter ("length").
        OSError: it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            return False
        if status.st_size != into.nbytes:
            raise TierError("length", f"{path} has {status.st_size} bytes instead of {into.nbytes}")
        done = 0
        while done < into.nbytes:
            got = os.preadv(file, [into[done:]], done)
            if got == 0:
                raise TierError("length", f"{path} ended after {done} bytes")
            done += got
        with contextlib.suppress(OSError):  # of a file that is deleted meanwhile, or another user's
            os.utime(file)
    finally:
        os.close(file)
    return True


def remove_if_dead(path: Path) -> bool:
    """Removes a temporary file unless its writer lives; returns whether it is gone.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _fill(file: int, blob: memoryview) -> None:
    """Whole pages directly, the rest by way of the page cache; all of it where the file system knows no better."""
    size, done = blob.nbytes, 0
    direct = np.frombuffer(blob, np.uint8).ctypes.data % PAGE == 0 and _set_direct(file, True)
    while done < size:
        end = size // PAGE * PAGE if direct else size
        if done < end:
            try:
                done += os.pwrite(file, blob[done:end], done)
                continue
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
        direct = _set_direct(file, False)


def _set_direct(file: int, on: bool) -> bool:
    """Whether it is on now."""
    with contextlib.suppress(OSError):
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | DIRECT if on else flags & ~DIRECT)
        return on and bool(DIRECT)
    return False
