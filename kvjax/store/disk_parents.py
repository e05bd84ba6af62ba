"""The parents of blocks on a disk, read from the headers of their files in the background.

    caller ── ask(keys) ──> a thread, while there is anything to read ── learned({key: parent}) ──> the tier's index

A folder may hold a hundred thousand files, so a start does not wait for this. A header is not proven, as its block is
when it is loaded: a wrong parent changes the order in which blocks leave and nothing else.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from kvjax.store.block import PAGE
from kvjax.store.keys import FORMAT
from kvjax.store.names import KEY

logger = logging.getLogger(__name__)
HEAD = 2 * PAGE  # bytes: the metadata of a block of 400 layers
START = b'{"__metadata__":'
ATTRIBUTE = "user.kvjax"  # of 32 bytes, where the header names another one: the fork that generated blocks begin with
SLICE = 500  # parents told at once: nobody waits long for the tier's lock


def parent_in(head: bytes, key: str) -> str:
    """The parent that the first `HEAD` bytes of a block name; "" if they are not those of the block `key`."""
    if head[8 : 8 + len(START)] != START:
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        fields, _ = json.JSONDecoder().raw_decode(head.decode("latin-1"), 8 + len(START))
        if fields["format"] == FORMAT and fields["key"] == key and KEY.fullmatch(fields["previous"]):
            return fields["previous"]
    return ""


def parent_of(path: Path) -> str:
    """The parent of the block in a file; "" where that cannot be known."""
    with contextlib.suppress(OSError, AttributeError):
        return os.getxattr(path, ATTRIBUTE).hex()
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError, AttributeError):  # the bytes behind are not read ahead
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            return parent_in(os.pread(file, HEAD, 0), path.name)
        finally:
            os.close(file)
    return ""


class ParentReader:
    """Reads parents in a thread of its own.

    Args:
        path: of the file of a key.
        learned: gets parents by key, parents before their children, from the thread.
    """

    def __init__(self, path: Callable[[str], Path], learned: Callable[[dict[str, str]], None]) -> None:
        self._path, self._learned = path, learned
        self._changed = threading.Condition()
        self._asked: list[str] = []
        self._thread: threading.Thread | None = None
        self._ended = False

    def ask(self, keys: Iterable[str]) -> None:
        """Has the parents of these read."""
        with self._changed:
            self._asked += keys
            if self._asked and self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._run, name="kvjax-disk-parents", daemon=True)
                self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Whether, within `timeout` seconds, nothing is left to read."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def close(self, timeout: float) -> None:
        """Ends the thread, which finishes the file that it reads. No call may follow."""
        with self._changed:
            self._ended = True
        self.wait(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                keys, self._asked = self._asked, []
                if not keys or self._ended:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                self._read(keys)
            except Exception:
                logger.exception("reading the headers of stored blocks failed")

    def _read(self, keys: list[str]) -> None:
        parents = {}
        for key in keys:
            if self._ended:
                return
            parents[key] = parent_of(self._path(key))
        ordered = parents_first(parents)
        for begin in range(0, len(ordered), SLICE):
            if not self._ended:
                self._learned({key: parents[key] for key in ordered[begin : begin + SLICE] if parents[key]})


def parents_first(parents: dict[str, str]) -> list[str]:
    """The keys of `parents`, each behind its parent; in a circle, which only a forger can make, anywhere."""
    ordered: dict[str, None] = {}
    for key in parents:
        chain = {}
        while key in parents and key not in ordered and key not in chain:
            chain[key] = None
            key = parents[key]
        ordered |= dict.fromkeys(reversed(chain))
    return list(ordered)
