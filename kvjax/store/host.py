"""The host tier: verified blocks in one block of memory that is allocated once.

Memory that is allocated anew costs thirty times a copy into memory that is there, so blocks live in buffers of one size.
Everything that comes from or goes to the device passes through here. The store's lock guards it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.store.block import PAGE, Blob
from kvjax.store.eviction import EvictionPolicy
from kvjax.store.pages import HostPages


@dataclasses.dataclass(eq=False)
class HostBuffer:
    """One block in memory. Whoever holds a lease on it may read `blob`; before it is `ready` its writer alone may.

    Attributes:
        key: of the block; "" where the buffer is nobody's.
        ready: whether the block is whole and proven.
        leases: how many hold it.
        dirty: whether a tier below does not have it yet.
        writing: whether it is on its way there.
        passing: whether it leaves with its last lease.
        hits: how often it was found.
    """

    blob: Blob
    key: str = ""
    ready: bool = False
    leases: int = 0
    dirty: bool = False
    writing: bool = False
    passing: bool = False
    hits: int = 0


class HostTier:
    """Buffers and who is in them.

    Args:
        most_bytes: of all buffers; no more is ever allocated.
        block_bytes: of one block.
        policy: who leaves first.
        leaving: is asked of each block before it leaves whether it may; a block that may not yet stays for now.
    """

    def __init__(
        self,
        most_bytes: int,
        block_bytes: int,
        policy: EvictionPolicy,
        leaving: Callable[[HostBuffer], bool] = lambda buffer: True,
    ) -> None:
        stride = -(-block_bytes // PAGE) * PAGE
        count = most_bytes // stride
        self._pages = HostPages(count * stride)
        begins = range(0, count * stride, stride)
        self._free = [HostBuffer(self._pages.memory[begin : begin + block_bytes]) for begin in reversed(begins)]
        self._buffers: dict[str, HostBuffer] = {}
        self._policy, self._leaving = policy, leaving
        self.capacity, self.stride = count, stride
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def used_bytes(self) -> int:
        return len(self._buffers) * self.stride

    def held(self) -> dict[str, Any]:
        """What the tier knows of its state."""
        return {
            "blocks": len(self),
            "used_bytes": self.used_bytes,
            "capacity_bytes": self.capacity * self.stride,
            "evictions": self.evictions,
        }

    def find(self, key: str) -> HostBuffer | None:
        """The block, if it is here and ready."""
        buffer = self._buffers.get(key)
        return buffer if buffer is not None and buffer.ready else None

    def holds(self, key: str) -> bool:
        """Whether a block is here, or somebody writes it."""
        return key in self._buffers

    def ready(self) -> list[HostBuffer]:
        """Every block that may be found."""
        return [buffer for buffer in self._buffers.values() if buffer.ready]

    def use(self, buffer: HostBuffer) -> None:
        """A block was found: it leaves later."""
        buffer.hits += 1
        self._policy.use(buffer.key)

    def touch(self, chain: Sequence[HostBuffer | None]) -> None:
        """What goes on from this chain was used: the chain leaves later than that, and its beginning last."""
        for buffer in reversed(chain):
            if buffer is not None:
                self._policy.use(buffer.key)

    def take(self, key: str) -> HostBuffer | None:
        """A buffer to write a new block to, leased to its writer; None if it is being written, or all are leased."""
        if key in self._buffers or not (self._free or self._evict()):
            return None
        buffer = self._free.pop()
        buffer.key, buffer.leases, buffer.hits = key, 1, 0
        buffer.ready = buffer.dirty = buffer.writing = buffer.passing = False
        self._buffers[key] = buffer
        self._policy.add(key)
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Gives a lease back; a block that never became ready is gone with the last one."""
        assert buffer.leases > 0, "a lease was given back twice"
        buffer.leases -= 1
        if not buffer.ready and buffer.leases == 0:
            self._drop(buffer)

    def discard(self, key: str) -> None:
        """Lets go of a block that nobody holds; no effect on others."""
        buffer = self._buffers.get(key)
        if buffer is not None and buffer.leases == 0:
            self._drop(buffer)

    def close(self) -> None:
        """Lets go of the memory, which is back with the last lease. No call may follow."""
        self._free.clear()
        self._buffers.clear()
        self._pages.close()

    def _evict(self) -> bool:
        for key in self._policy.order():
            buffer = self._buffers[key]
            if buffer.leases == 0 and self._leaving(buffer):
                self._drop(buffer)
                self.evictions += 1
                return True
        return False

    def _drop(self, buffer: HostBuffer) -> None:
        self._policy.remove(buffer.key)
        del self._buffers[buffer.key]
        buffer.key, buffer.ready = "", False
        self._free.append(buffer)

    def check_integrity(self) -> None:
        """Raises AssertionError if a buffer is lost, in two places, or leased while nobody works with the store."""
        assert len(self._free) + len(self._buffers) == self.capacity
        assert all(buffer.key == key for key, buffer in self._buffers.items())
        assert sorted(self._policy.order()) == sorted(self._buffers)
        for buffer in self._buffers.values():
            assert buffer.ready, f"{buffer.key}: begun and neither finished nor given up"
            assert buffer.leases == 0, f"{buffer.key}: {buffer.leases} leases are left"
