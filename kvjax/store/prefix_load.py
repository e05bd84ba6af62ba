"""Blocks on their way to host memory for one request, and the leases that keep them there.

A fetch loads the beginning of a chain and nothing behind a gap: what is missing, late or harmed ends it there, and the
rest is computed. Several requests that want one block wait for one load of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvjax.store.block import Blob
from kvjax.store.host import HostBuffer
from kvjax.store.keys import BlockKey

if TYPE_CHECKING:
    from kvjax.store.store import KVStore

LEASE = 600.0  # seconds after which a fetch that nobody has asked anything loses its leases


class LeaseExpiredError(Exception):
    """A fetch was asked for blocks that it had held too long without a word."""


class PrefixLoad:
    """The blocks of one prompt. A context manager: on exit nothing is leased any more.

    Attributes:
        names: of all whole blocks of the prompt that may be used.
        fork: how many of them are of the chain that was asked for first; behind it another one goes on.
        started: when it began, by `time.monotonic`.
        done: whether nothing more will come.
    """

    def __init__(self, store: KVStore, names: Sequence[BlockKey], unit: int, on_done: Callable[[], None]) -> None:
        """`KVStore.fetch` makes it. `unit`: blocks of a chunk; `on_done` is called, from any thread, once it is done."""
        self.names, self.fork, self.started, self.done = names, len(names), time.monotonic(), False
        self._store, self.unit, self._on_done = store, unit, on_done
        self.buffers: list[HostBuffer | None] = [None] * len(names)
        self.tiers: list[str] = []  # where each block was found
        self.limit = len(names)  # blocks behind it are not wanted any more
        self.closed = False
        self.deadline = self.started + LEASE
        self._asked, self._front, self._measured = 0, 0, self.started

    def __enter__(self) -> PrefixLoad:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def loaded(self) -> int:
        """How many blocks from the first on are in host memory, without a gap. Whole chunks count only."""
        with self._store.mutex:
            return self._whole()

    @property
    def found(self) -> tuple[str, ...]:
        """Which tier each of the loaded blocks came from."""
        with self._store.mutex:
            return tuple(self.tiers[: self._whole()])

    def stop(self) -> None:
        """Takes what is loaded now and nothing more: leases behind it are given back."""
        with self._store.mutex:
            whole = self._whole()
            self.limit, self.done = whole, True
            for index in range(whole, len(self.buffers)):
                self._let_go(index)

    def blob(self, index: int) -> Blob:
        """The bytes of a loaded block, which stay as they are until the fetch is closed.

        Raises:
            LeaseExpiredError: nobody asked for anything for `LEASE` seconds.
        """
        with self._store.mutex:
            buffer = self.buffers[index]
            if self.closed or buffer is None:
                raise LeaseExpiredError(f"block {index} was held for more than {LEASE:.0f} s without being used")
            self.renew()
            return buffer.blob

    def renew(self) -> None:
        """Says that somebody still wants the blocks."""
        self.deadline = time.monotonic() + LEASE

    def close(self) -> None:
        """Gives every lease back. May be called twice."""
        with self._store.mutex:
            if self.closed:
                return
            self.closed = self.done = True
            for index in range(len(self.buffers)):
                self._let_go(index)
            self._store.forget(self)

    # What follows is the store's side, under its mutex.

    @property
    def held(self) -> int:
        """Blocks from the first on that are in host memory, without a gap."""
        return next((index for index, buffer in enumerate(self.buffers) if buffer is None), len(self.buffers))

    def turn(self, fork: int, names: Sequence[BlockKey]) -> bool:
        """The first chain ends after `fork` blocks: other names stand behind. Not any more for a fetch that is done."""
        if self.done:
            return False
        for index in range(fork, len(self.buffers)):
            self._let_go(index)
        self.names, self.fork = [*self.names[:fork], *names], fork
        return True

    def due(self) -> list[int]:
        """The blocks to load now, each only once.

        All that are wanted, but of a tier that nobody has measured one chunk: whether to want more is chosen then.
        """
        first = self._asked
        if self.closed or self.held < first:
            return []
        self._asked = max(first, self.limit)
        for index in range(first, self._asked):
            if self.buffers[index] is None and self._store.planner.load_seconds(self.tiers[index]) is None:
                self._asked = min((index // self.unit + 1) * self.unit, self.limit)
                break
        return [index for index in range(first, self._asked) if self.buffers[index] is None]

    def place(self, index: int, buffer: HostBuffer, tier: str) -> None:
        """A block has come, with a lease for this fetch."""
        if self.closed or index >= self.limit:
            self._store.release(buffer)
            return
        self.buffers[index] = buffer
        if index < len(self.tiers):
            self.tiers[index] = tier
        self._replan()

    def miss(self, index: int) -> None:
        """A block will not come: nor does what is behind it matter."""
        self.limit = min(self.limit, index)
        self.settle()

    def wants(self, index: int) -> bool:
        return not self.closed and index < self.limit

    def settle(self) -> None:
        """Ends the fetch if nothing that it wants is missing."""
        if not self.done and all(buffer is not None for buffer in self.buffers[: self.limit]):
            self.done = True
            self._on_done()

    def _whole(self) -> int:
        return min(self.held, self.limit) // self.unit * self.unit

    def _replan(self) -> None:
        """After each chunk: how long did it take, and is the rest still worth it?"""
        whole = self._whole()
        if whole > self._front:
            now, tier = time.monotonic(), slowest(self.tiers[self._front : whole])
            if tier != "host":
                self._store.planner.loaded(tier, now - self._measured, (whole - self._front) / self.unit)
            self._front, self._measured = whole, now
            ahead = [
                slowest(self.tiers[start : start + self.unit])
                for start in range(whole, min(self.limit, len(self.tiers)), self.unit)
            ]
            self.limit = min(self.limit, whole + self._store.planner.choose(ahead, whole // self.unit) * self.unit)
        self.settle()

    def _let_go(self, index: int) -> None:
        buffer, self.buffers[index] = self.buffers[index], None
        if buffer is not None:
            self._store.release(buffer)


def slowest(tiers: Sequence[str]) -> str:
    """The tier that decides how long a chunk takes: the one farthest from the device."""
    return max(tiers, key=("host", "disk", "remote").index)
