"""A tier of few blocks in memory, which evicts as the disk tier does; and what an ideal tier of its size would hold."""

from collections.abc import Sequence

from kvjax.store.eviction import LRU, EvictionPolicy
from kvjax.store.keys import BlockKey
from kvjax.store.tier import TierError
from tests.store.memory_tier import MemoryTier


class EvictingTier(MemoryTier):
    """Holds at most `blocks` blocks; survives the store that it is given to."""

    name, evicts = "disk", True

    def __init__(self, blocks: int, policy: EvictionPolicy | None = None) -> None:
        super().__init__()
        self.blocks, self.policy = blocks, policy or LRU()

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        with self._lock:
            if key in self._objects:
                return
            while len(self._objects) >= self.blocks:
                chain = {parent, *self.policy.ancestors(parent)}
                victim = next(self.policy.order(chain.__contains__), None)
                if victim is None:
                    raise TierError("full", "nothing may leave")
                self.policy.remove(victim)
                del self._objects[victim]
            self._objects[key] = bytes(blob)
            self.policy.add(key, parent)

    def touch(self, keys: Sequence[str]) -> list[bool]:
        with self._lock:
            for key in reversed(keys):
                self.policy.use(key)
            return [key in self._objects for key in keys]

    def close(self) -> None:
        pass


class Ideal:
    """Leaf-first least recently used, told of each request as a whole."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.parents: dict[str, str] = {}
        self.used: dict[str, int] = {}
        self.now = 0

    def request(self, chain: Sequence[BlockKey]) -> None:
        self.now += 1
        own = {key.hex for key in chain}
        for key in chain:
            if key.hex not in self.parents:
                if len(self.parents) >= self.blocks:
                    inner = set(self.parents.values())
                    leaves = [other for other in self.parents if other not in inner and other not in own]
                    if not leaves:
                        break
                    victim = min(leaves, key=lambda other: self.used[other])
                    del self.parents[victim], self.used[victim]
                self.parents[key.hex] = key.previous.hex()
            self.used[key.hex] = self.now

    def extent(self, chain: Sequence[BlockKey]) -> int:
        """Blocks of a chain that it holds from the first on."""
        return next((index for index, key in enumerate(chain) if key.hex not in self.parents), len(chain))
