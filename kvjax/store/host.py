"""The host tier: verified blocks in one block of memory that is allocated once.

Memory that is allocated anew costs thirty times a copy into memory that is there, so blocks live in slabs of one size.
Everything that comes from or goes to the device passes through here. The store's lock guards it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.store.block import PAGE, Blob
from kvjax.store.eviction import EvictionPolicy
from kvjax.store.pages import Pages


@dataclasses.dataclass(eq=False)
class Slab:
    """One block in memory. Whoever holds a lease on it may read `blob`; before it is `ready` its writer alone may.

    Attributes:
        key: of the block; "" where the slab is nobody's.
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
    """Slabs and who is in them.

    Args:
        most_bytes: of all slabs; no more is ever allocated.
        block_bytes: of one block.
        policy: who leaves first.
        leaving: is asked of each block before it leaves whether it may; a block that may not yet stays for now.
    """

    def __init__(
        self,
        most_bytes: int,
        block_bytes: int,
        policy: EvictionPolicy,
        leaving: Callable[[Slab], bool] = lambda slab: True,
    ) -> None:
        stride = -(-block_bytes // PAGE) * PAGE
        count = most_bytes // stride
        self._pages = Pages(count * stride)
        begins = range(0, count * stride, stride)
        self._free = [Slab(self._pages.memory[begin : begin + block_bytes]) for begin in reversed(begins)]
        self._slabs: dict[str, Slab] = {}
        self._policy, self._leaving = policy, leaving
        self.capacity, self.stride = count, stride
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._slabs)

    @property
    def used_bytes(self) -> int:
        return len(self._slabs) * self.stride

    def held(self) -> dict[str, Any]:
        """What the tier knows of its state."""
        return {
            "blocks": len(self),
            "used_bytes": self.used_bytes,
            "capacity_bytes": self.capacity * self.stride,
            "evictions": self.evictions,
        }

    def find(self, key: str) -> Slab | None:
        """The block, if it is here and ready."""
        slab = self._slabs.get(key)
        return slab if slab is not None and slab.ready else None

    def holds(self, key: str) -> bool:
        """Whether a block is here, or somebody writes it."""
        return key in self._slabs

    def ready(self) -> list[Slab]:
        """Every block that may be found."""
        return [slab for slab in self._slabs.values() if slab.ready]

    def use(self, slab: Slab) -> None:
        """A block was found: it leaves later."""
        slab.hits += 1
        self._policy.use(slab.key)

    def touch(self, chain: Sequence[Slab | None]) -> None:
        """What goes on from this chain was used: the chain leaves later than that, and its beginning last."""
        for slab in reversed(chain):
            if slab is not None:
                self._policy.use(slab.key)

    def take(self, key: str) -> Slab | None:
        """A slab to write a new block to, leased to its writer; None if it is being written, or all are leased."""
        if key in self._slabs or not (self._free or self._evict()):
            return None
        slab = self._free.pop()
        slab.key, slab.leases, slab.hits = key, 1, 0
        slab.ready = slab.dirty = slab.writing = slab.passing = False
        self._slabs[key] = slab
        self._policy.add(key)
        return slab

    def release(self, slab: Slab) -> None:
        """Gives a lease back; a block that never became ready is gone with the last one."""
        assert slab.leases > 0, "a lease was given back twice"
        slab.leases -= 1
        if not slab.ready and slab.leases == 0:
            self._drop(slab)

    def discard(self, key: str) -> None:
        """Lets go of a block that nobody holds; no effect on others."""
        slab = self._slabs.get(key)
        if slab is not None and slab.leases == 0:
            self._drop(slab)

    def close(self) -> None:
        """Lets go of the memory, which is back with the last lease. No call may follow."""
        self._free.clear()
        self._slabs.clear()
        self._pages.close()

    def _evict(self) -> bool:
        for key in self._policy.order():
            slab = self._slabs[key]
            if slab.leases == 0 and self._leaving(slab):
                self._drop(slab)
                self.evictions += 1
                return True
        return False

    def _drop(self, slab: Slab) -> None:
        self._policy.remove(slab.key)
        del self._slabs[slab.key]
        slab.key, slab.ready = "", False
        self._free.append(slab)

    def check_integrity(self) -> None:
        """Raises AssertionError if a slab is lost, in two places, or leased while nobody works with the store."""
        assert len(self._free) + len(self._slabs) == self.capacity
        assert all(slab.key == key for key, slab in self._slabs.items())
        assert sorted(self._policy.order()) == sorted(self._slabs)
        for slab in self._slabs.values():
            assert slab.ready, f"{slab.key}: begun and neither finished nor given up"
            assert slab.leases == 0, f"{slab.key}: {slab.leases} leases are left"
