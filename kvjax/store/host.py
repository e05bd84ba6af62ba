"""Host tier: verified blocks in one piece of memory that is allocated once.

Memory that is allocated anew costs thirty times a copy into memory that is there, so blocks live in buffers of one
size. Everything that comes from or goes to the device passes through here. The store's lock guards it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.store.block import PAGE, Blob
from kvjax.store.eviction import EvictionPolicy
from kvjax.store.pages import HostPages


def stride(block_bytes: int) -> int:
    """Bytes of host memory that a block takes: whole pages."""
    return -(-block_bytes // PAGE) * PAGE


@dataclasses.dataclass(eq=False)
class HostBuffer:
    """One block in memory. A holder of a lease may read `blob`; before it is `ready` only its writer may.

    Attributes:
        key: of the block, as tiers spell it; "" where the buffer is free. `parent` is that of the block before it; ""
            for the first of a prompt.
        ready: whether the block is whole and proven; until then it is *pending*.
        leases: how many hold it.
        missing: names of the tiers below that should have it and, as far as is known, do not.
        transient: whether it leaves with its last lease.
        tail: whether the block is not full, and so of use to an equal prompt alone.
        hits: how often it was used.
    """

    blob: Blob
    key: str = ""
    parent: str = ""
    ready: bool = False
    leases: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)
    transient: bool = False
    tail: bool = False
    hits: int = 0


class HostTier:
    """Buffers, and the block that each of them holds.

    Args:
        max_bytes: of all buffers; no more is ever allocated.
        block_bytes: of one block.
        policy: the order of eviction.
        may_leave: asked of a block before it is evicted; one that may not stays for now, and so do its ancestors.
    """

    def __init__(
        self,
        max_bytes: int,
        block_bytes: int,
        policy: EvictionPolicy,
        may_leave: Callable[[HostBuffer], bool] = lambda buffer: True,
    ) -> None:
        step = stride(block_bytes)
        count = max_bytes // step
        self._pages = HostPages(count * step)
        begins = range(0, count * step, step)
        self._free = [HostBuffer(self._pages.memory[begin : begin + block_bytes]) for begin in reversed(begins)]
        self._buffers: dict[str, HostBuffer] = {}
        self._policy, self._may_leave = policy, may_leave
        self.capacity, self.stride = count, step
        self.evictions = 0
        self._quarantined = 0

    def __len__(self) -> int:
        return len(self._buffers)

    @property
    def used_bytes(self) -> int:
        return len(self._buffers) * self.stride

    def held(self) -> dict[str, Any]:
        """Its state, by the names of `TierStats`."""
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

    def pending(self, key: str) -> bool:
        """Whether a block is being written or loaded: ready soon, or given up."""
        buffer = self._buffers.get(key)
        return buffer is not None and not buffer.ready

    def ready(self) -> list[HostBuffer]:
        """Every block that may be found."""
        return [buffer for buffer in self._buffers.values() if buffer.ready]

    def lineage(self, key: str) -> list[HostBuffer]:
        """A block and its ancestors as far as they are here and ready, the first of the chain first."""
        chain: list[HostBuffer] = []
        buffer = self.find(key)
        while buffer is not None:
            chain.append(buffer)
            buffer = self.find(buffer.parent)
        return chain[::-1]

    def use(self, chain: Sequence[HostBuffer]) -> None:
        """Blocks of one chain, from its beginning on, are used now: its end leaves first."""
        for buffer in reversed(chain):
            buffer.hits += 1
            self._policy.use(buffer.key)

    def take(self, key: str, parent: str = "") -> HostBuffer | None:
        """A buffer for a new block, leased to its writer; None if the block is here already, or nothing may leave."""
        if key in self._buffers or not (self._free or self._evict()):
            return None
        buffer = self._free.pop()
        buffer.key, buffer.parent, buffer.leases, buffer.hits = key, parent, 1, 0
        buffer.ready, buffer.transient, buffer.tail, buffer.missing = False, False, False, set()
        self._buffers[buffer.key] = buffer
        self._policy.add(buffer.key, buffer.parent)
        return buffer

    def release(self, buffer: HostBuffer) -> None:
        """Gives a lease back; a block that never became ready, or is transient, goes with the last one."""
        assert buffer.leases > 0, "a lease was given back twice"
        buffer.leases -= 1
        if buffer.leases == 0 and (buffer.transient or not buffer.ready):
            self._drop(buffer)

    def quarantine(self, buffer: HostBuffer) -> None:
        """The block is given up, but its memory may still be written to: nobody gets it until `readmit`."""
        self._forget(buffer)
        self._quarantined += 1

    def readmit(self, buffer: HostBuffer) -> None:
        """Nothing writes to a buffer any more that was quarantined."""
        buffer.leases = 0
        self._quarantined -= 1
        self._free.append(buffer)

    def close(self) -> None:
        """Lets go of the memory, which is back with the last lease. No call may follow."""
        self._free.clear()
        self._buffers.clear()
        self._pages.close()

    def _evict(self) -> bool:
        for key in self._policy.order(self._stays):
            self._drop(self._buffers[key])
            self.evictions += 1
            return True
        return False

    def _stays(self, key: str) -> bool:
        buffer = self._buffers[key]
        return buffer.leases > 0 or not self._may_leave(buffer)

    def _drop(self, buffer: HostBuffer) -> None:
        self._forget(buffer)
        self._free.append(buffer)

    def _forget(self, buffer: HostBuffer) -> None:
        self._policy.remove(buffer.key)
        del self._buffers[buffer.key]
        buffer.key, buffer.parent, buffer.ready = "", "", False

    def check_integrity(self) -> None:
        """Raises AssertionError if a buffer is lost, in two places, or leased while nobody works with the store."""
        assert len(self._free) + len(self._buffers) + self._quarantined == self.capacity
        assert all(buffer.key == key for key, buffer in self._buffers.items())
        assert sorted(self._policy.order()) == sorted(self._buffers)
        for buffer in self._buffers.values():
            assert buffer.ready, f"{buffer.key}: begun and neither finished nor given up"
            assert buffer.leases == 0, f"{buffer.key}: {buffer.leases} leases are left"
