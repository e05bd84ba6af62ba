"""Who leaves first when a tier is full: an order over keys, told of every arrival, use and departure.

Whoever uses a chain of blocks tells of its last one first, so the beginning of a prompt, which more prompts share,
counts as used later and leaves later.
"""

import abc
import collections
import heapq
import itertools
from collections.abc import Callable, Iterator


class EvictionPolicy(abc.ABC):
    """Keys of one tier, in the order in which they should leave."""

    @abc.abstractmethod
    def add(self, key: str) -> None:
        """A key has arrived."""

    @abc.abstractmethod
    def use(self, key: str) -> None:
        """A key that is here was used."""

    @abc.abstractmethod
    def remove(self, key: str) -> None:
        """A key has left, for whatever reason."""

    @abc.abstractmethod
    def order(self) -> Iterator[str]:
        """All keys, the first to leave first. The caller may stop at any one, and changes nothing meanwhile."""


class FIFO(EvictionPolicy):
    """First in, first out: no use counts."""

    def __init__(self) -> None:
        self._keys: collections.OrderedDict[str, None] = collections.OrderedDict()

    def add(self, key: str) -> None:
        self._keys[key] = None

    def use(self, key: str) -> None:
        pass

    def remove(self, key: str) -> None:
        self._keys.pop(key, None)

    def order(self) -> Iterator[str]:
        return iter(self._keys)


class LRU(FIFO):
    """Least recently used first."""

    def use(self, key: str) -> None:
        self._keys.move_to_end(key)


class LFU(EvictionPolicy):
    """Least often used first, and of those the least recently used."""

    def __init__(self) -> None:
        self._clock = itertools.count()
        self._uses: dict[str, tuple[int, int]] = {}  # how often, and when last

    def add(self, key: str) -> None:
        self._uses[key] = (0, next(self._clock))

    def use(self, key: str) -> None:
        self._uses[key] = (self._uses[key][0] + 1, next(self._clock))

    def remove(self, key: str) -> None:
        self._uses.pop(key, None)

    def order(self) -> Iterator[str]:
        heap = [(uses, key) for key, uses in self._uses.items()]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[1]


class ARC(EvictionPolicy):
    """Adaptive replacement (Megiddo and Modha, 2003): the keys used once and those used again, each in LRU order.

    What was thrown out is remembered for a while: a return says that its list was too short, and moves the border.
    """

    def __init__(self) -> None:
        self._once: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._again: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._once_gone: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._again_gone: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._target = 0.0  # how many keys used once should be here

    def add(self, key: str) -> None:
        size = len(self._once) + len(self._again) + 1
        if key in self._once_gone:
            step = max(1.0, len(self._again_gone) / len(self._once_gone))
            self._target = min(self._target + step, size)
            del self._once_gone[key]
            self._again[key] = None
        elif key in self._again_gone:
            step = max(1.0, len(self._once_gone) / len(self._again_gone))
            self._target = max(self._target - step, 0.0)
            del self._again_gone[key]
            self._again[key] = None
        else:
            self._once[key] = None

    def use(self, key: str) -> None:
        self._once.pop(key, None)
        self._again[key] = None
        self._again.move_to_end(key)

    def remove(self, key: str) -> None:
        held = len(self._once) + len(self._again)
        for here, gone in ((self._once, self._once_gone), (self._again, self._again_gone)):
            if key in here:
                del here[key]
                gone[key] = None
            while len(gone) > held:
                gone.popitem(last=False)

    def order(self) -> Iterator[str]:
        first, second = (self._once, self._again) if len(self._once) > self._target else (self._again, self._once)
        return itertools.chain(first, second)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO, "arc": ARC}
