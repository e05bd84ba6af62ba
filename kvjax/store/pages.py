"""Memory that the kernel is asked for before anybody needs it, in the background and from the front.

A page that is written for the first time costs thirty times one that is there, so whoever stores a block shall not be
the first to write; and a server with hundreds of gigabytes shall not wait for them before it answers.
"""

import contextlib
import ctypes
import mmap
import threading

import numpy as np

from kvjax.store.block import Blob

MADV_POPULATE_WRITE = 23  # of Linux since 5.14; Python has no name for it yet
STEP = 64 << 20  # bytes at once: how long `close` may have to wait


class HostPages:
    """A block of zeros that begins at a page, in large pages where the kernel has them.

    Attributes:
        memory: all of it, which may be used from the beginning.
    """

    def __init__(self, nbytes: int) -> None:
        self.memory: Blob = np.zeros(0, np.uint8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="kvjax-pages", daemon=True)
        if nbytes:
            mapped = mmap.mmap(-1, nbytes)
            with contextlib.suppress(OSError, AttributeError):
                mapped.madvise(mmap.MADV_HUGEPAGE)
            self.memory = np.frombuffer(mapped, np.uint8)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Whether, within `timeout` seconds, the kernel has given all that it gives unasked."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Lets go of the memory, which is back once nobody else holds it."""
        self._ended.set()
        self._thread.join()
        self.memory = np.zeros(0, np.uint8)

    def _ask(self) -> None:
        # not `mmap.madvise`, which keeps every other thread from running meanwhile
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        begin, size = self.memory.ctypes.data, self.memory.nbytes
        for offset in range(0, size, STEP):
            if self._ended.is_set() or advise(begin + offset, min(STEP, size - offset), MADV_POPULATE_WRITE):
                return  # an older kernel gives each page when it is used
