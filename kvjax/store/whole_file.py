"""A file that is whole or not there: written beside its place, then renamed.

It is written past the operating system's page cache where that is possible. What was written lately is in the host tier
anyway, so a second copy would only cost memory and, on cores that may have to compute, the time to fill it.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import numpy as np

from kvjax.store.block import PAGE

TEMPORARY = ".__lock"  # how the name of a file ends that is being written
DIRECT = getattr(os, "O_DIRECT", 0)  # of Linux


def write_whole(path: Path, blob: memoryview, *, sync: bool) -> None:
    """Writes a file that only its owner may read.

    Args:
        blob: where it begins at a whole page of memory it is not copied.
        sync: whether it is on the medium, and so is its name, when this returns.

    Raises:
        OSError: it could not be written, and unless that is of the name's `sync` it is not there.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _fill(file, blob)
            if sync:
                os.fsync(file)
        finally:
            os.close(file)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
