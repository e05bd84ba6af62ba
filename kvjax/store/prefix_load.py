"""Prefix load: the blocks of one request on their way to host memory, and the leases that keep them there.

A load brings the beginning of a chain and nothing behind a gap: what is missing, late or harmed ends it there, and the
rest is computed. It owns its state; `LoadQueue` decides when it begins and brings the blocks.
"""

import threading
import time
from collections.abc import Callable, Sequence

from kvjax.store.block import Blob
from kvjax.store.host import HostBuffer
from kvjax.store.keys import BlockKey
from kvjax.store.planner import Planner
from kvjax.store.stats import HOST

LEASE = 600.0  # seconds after which a load that nothing has been asked of loses its leases
SHORTEST_WAIT = 0.05  # seconds that a block may be late, however fast it could be computed

Chain = Callable[[int], Sequence[BlockKey]]


class LeaseExpiredError(Exception):
    """A load was asked for blocks that it had held for too long without being used."""


class PrefixLoad:
    """A context manager: on exit nothing is leased any more.

    All that says "under the mutex" is for `LoadQueue` alone; the rest may be called from any thread.

    Attributes:
        keys: of all blocks of the prompt that may be used; `dense_keys` are those that it was opened for.
        chain: where the dense chain ends after so many blocks, the keys to look for behind; None for none.
        unit: blocks that count together; a load is cut to a multiple of it.
        dense_prefix_length: blocks of the chain that was asked for first; behind them another chain goes on.
        started: when it began to load, by `time.monotonic`; before that, when it was made.
        admitted: whether host memory is reserved for it.
        done: whether nothing more is on its way; `stopped`: because its request has taken what there was.
        sources: the tier of each block from the first on, as far as they are located; `located` once there are no more.
        limit: blocks behind it are not wanted any more.
    """

    def __init__(
        self,
        keys: Sequence[BlockKey],
        unit: int,
        mutex: threading.RLock,
        planner: Callable[[], Planner],
        release: Callable[[HostBuffer], None],
        on_done: Callable[[], None],
        on_use: Callable[[Sequence[HostBuffer]], None],
        on_close: Callable[["PrefixLoad"], None],
        chain: Chain | None = None,
    ) -> None:
        """`LoadQueue.open` makes it."""
        self.keys, self.dense_keys, self.unit, self.chain = list(keys), tuple(keys), unit, chain
        self.dense_prefix_length, self.started = len(self.keys), time.monotonic()
        self.admitted = self.located = self.done = self.stopped = self.closed = False
        self.buffers: list[HostBuffer | None] = [None] * len(self.keys)
        self.sources: list[str] = []
        self.limit = len(self.keys)
        self.deadline = self.started + LEASE
        self._mutex, self._planner, self._release = mutex, planner, release
        self._on_done, self._on_use, self._on_close = on_done, on_use, on_close
        self._used = False
        self._requested: set[int] = set()
        self._front, self._progress = 0, self.started  # blocks that have come without a gap, and when the last did

    def __enter__(self) -> "PrefixLoad":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def loaded(self) -> int:
        """Blocks from the first on that are in host memory, without a gap; a multiple of `unit`."""
        with self._mutex:
            return self.whole

    @property
    def found(self) -> tuple[str, ...]:
        """The tier that each of the loaded blocks came from."""
        with self._mutex:
            return tuple(self.sources[: self.whole])

    def ready_at(self, patience: float, *, bounded: bool = True) -> float:
        """When its request should stop waiting for it, by `time.monotonic`: at most `patience` seconds after its start.

        0 once it is done.

        Args:
            bounded: whether it waits no longer for a tier, without a new block, than computing what is missing takes.
                What another request is computing is waited for all the same: to begin anew would take longer.
        """
        if self.done:
            return 0.0
        with self._mutex:
            end = self.started + patience
            computed_here = self._front < len(self.sources) and self.sources[self._front] == HOST
            compute = self._planner().compute_seconds(self._front, max(self.limit - self._front, 1))
            if not bounded or computed_here or compute is None:
                return end
            return min(end, self._progress + max(compute, SHORTEST_WAIT))

    def stop(self) -> None:
        """Takes what is loaded now and nothing more: leases behind it are given back."""
        with self._mutex:
            self.limit, self.done, self.stopped = self.whole, True, True
            self._use()
            for index in range(self.limit, len(self.buffers)):
                self._let_go(index)

    def blob(self, index: int) -> Blob:
        """The bytes of a loaded block, which stay as they are until the load is closed.

        Raises:
            LeaseExpiredError: nothing was asked of the load for `LEASE` seconds.
        """
        with self._mutex:
            buffer = self.buffers[index]
            if self.closed or buffer is None:
                raise LeaseExpiredError(f"block {index} was held for more than {LEASE:.0f} s without being used")
            self.renew()
            return buffer.blob

    def renew(self) -> None:
        """Its request still wants the blocks: the leases last for `LEASE` seconds from now on."""
        self.deadline = time.monotonic() + LEASE

    def close(self) -> None:
        """Gives every lease back. May be called twice."""
        with self._mutex:
            if self.closed:
                return
            self._use()
            self.closed = self.done = True
            for index in range(len(self.buffers)):
                self._let_go(index)
            self._on_close(self)

    # Under the mutex.

    @property
    def held(self) -> int:
        """Blocks from the first on that are in host memory, without a gap."""
        return next((index for index, buffer in enumerate(self.buffers) if buffer is None), len(self.buffers))

    @property
    def whole(self) -> int:
        return min(self.held, self.limit) // self.unit * self.unit

    def admit(self) -> None:
        """Host memory is reserved: from now on it may load."""
        self.admitted = True
        self.started = self._progress = time.monotonic()

    def switch_chain(self, end: int, keys: Sequence[BlockKey]) -> None:
        """The dense chain is used for `end` blocks: others follow there."""
        for index in range(end, len(self.buffers)):
            self._let_go(index)
        self.keys, self.dense_prefix_length = [*self.dense_keys[:end], *keys], end
        self.buffers = [*self.buffers[:end], *([None] * len(keys))]
        self.limit = min(max(self.limit, end), len(self.keys))
        del self.sources[end:]
        self._requested = {index for index in self._requested if index < end}

    def due(self) -> list[int]:
        """Located blocks to load now, each once.

        All that are wanted; but of a tier that was never measured one unit, after which the rest is chosen again.
        """
        if self.done or not self.admitted:
            return []
        due: list[int] = []
        for index in range(self._front, min(self.limit, len(self.sources))):
            if self.buffers[index] is not None or index in self._requested:
                continue
            source = self.sources[index]
            unknown = source != HOST and self._planner().load_seconds(source) is None
            if unknown and index >= (self._front // self.unit + 1) * self.unit:
                break
            due.append(index)
        self._requested.update(due)
        return due

    def place(self, index: int, buffer: HostBuffer, tier: str) -> None:
        """A block has come, with a lease for this load."""
        if self.closed or index >= self.limit:
            self._release(buffer)
            return
        self.buffers[index] = buffer
        if index < len(self.sources):
            self.sources[index] = tier

    def miss(self, index: int) -> None:
        """A block will not come, so what is behind it is of no use."""
        self.limit = min(self.limit, index)

    def measure(self) -> tuple[str, float, int] | None:
        """After each unit: the slowest tier it came from, the seconds that it took, and its blocks."""
        whole = self.whole
        if whole <= self._front:
            return None
        now = time.monotonic()
        took, blocks, sources = now - self._progress, whole - self._front, set(self.sources[self._front : whole])
        self._front, self._progress = whole, now
        return max(sources, key=lambda tier: self._planner().load_seconds(tier) or 0.0), took, blocks

    def settle(self) -> None:
        """Ends the load if it is located and nothing that it wants is missing."""
        if self.located and not self.done and all(buffer is not None for buffer in self.buffers[: self.limit]):
            self.done = True
            self._on_done()

    def end_location(self) -> None:
        """Nothing more of the chain lies anywhere."""
        self.located = True
        self.limit = min(self.limit, len(self.sources))

    def reopen(self, sources: Sequence[str]) -> None:
        """Blocks behind those that are loaded have become available meanwhile."""
        whole = self.whole
        self.sources = [*self.sources[:whole], *sources]
        self.limit = len(self.sources) // self.unit * self.unit
        self._requested = {index for index in self._requested if index < whole}
        self.started = self._progress = time.monotonic()
        self.done, self.located = False, True

    def _use(self) -> None:
        """Once: what has come counts as used, before anything is stored behind it."""
        chain = [buffer for buffer in self.buffers[: self.whole] if buffer is not None]
        if chain and not self._used:
            self._used = True
            self._on_use(chain)

    def _let_go(self, index: int) -> None:
        buffer, self.buffers[index] = self.buffers[index], None
        if buffer is not None:
            self._release(buffer)
