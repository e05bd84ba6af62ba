"""Memory from the kernel: there before it is needed, and gone when nobody wants it."""

import mmap
import time
import weakref
from pathlib import Path

import numpy as np

from kvjax.store.pages import STEP, HostPages


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_all_of_it_comes_without_being_used():
    before = resident()
    pages = HostPages(3 * STEP + mmap.PAGESIZE)
    assert pages.memory.nbytes == 3 * STEP + mmap.PAGESIZE
    assert pages.wait(60.0)
    assert resident() - before > 3 * STEP - (8 << 20), "what else came or went meanwhile is little"
    assert not pages.memory.any()
    pages.close()


def test_what_is_written_meanwhile_stays():
    pages = HostPages(2 * STEP)
    pages.memory[:: mmap.PAGESIZE] = np.arange(2 * STEP // mmap.PAGESIZE) % 251
    assert pages.wait(60.0)
    assert (pages.memory[:: mmap.PAGESIZE] == np.arange(2 * STEP // mmap.PAGESIZE) % 251).all()
    pages.close()


def test_who_closes_does_not_wait_for_what_he_does_not_want():
    began = time.monotonic()
    pages = HostPages(4 << 30)
    memory = weakref.ref(pages.memory)
    pages.close()
    assert memory() is None
    assert time.monotonic() - began < 10.0


def test_no_memory_is_none():
    pages = HostPages(0)
    assert pages.memory.nbytes == 0
    assert pages.wait(1.0)
    pages.close()
