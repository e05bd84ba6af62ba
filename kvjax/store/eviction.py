"""Eviction policies: an order over the keys of a full tier, in which the end of a chain leaves before its beginning.

A block is of use only behind all those before it. So a policy ranks the leaves, the keys of which no present key is a
child; when one has left, its parent may be a leaf. Every policy adds, uses, removes and takes a key in O(log n).
"""

import abc
import collections
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from kvjax.store.ranked_heap import RankedHeap

DEAD = -1  # the group of the keys that nobody can reach


def never(key: str) -> bool:
    """The predicate of `EvictionPolicy.order` with which every key may leave."""
    return False


class EvictionPolicy(abc.ABC):
    """Keys of one tier, in the order in which they should leave. Whoever shares it between threads guards it.

    Parents never form a circle. A key is dead if one of its ancestors is named as a parent and is absent: prefixes are
    loaded from their beginning, so nobody can use it, and it leaves before all that are not.
    """

    def __init__(self) -> None:
        self._clock = itertools.count()
        self._ranks: dict[str, Any] = {}
        self._parents: dict[str, str] = {}
        self._children = _Children()
        self._dead: set[str] = set()
        self._leaves: collections.defaultdict[int, RankedHeap] = collections.defaultdict(RankedHeap)  # by group

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: str) -> bool:
        return key in self._parents

    def add(self, key: str, parent: str = "") -> None:
        """A key has arrived; one that is here already only gets its parent.

        Args:
            parent: key before it in its chain; "" where it is the first, or that is unknown. A parent that is not here
                makes the key dead until it comes.
        """
        if key in self._parents:
            if parent in ("", self._parents[key]):
                return
            self._unlink(key)
        else:
            self._arrive(key)
        known, self._parents[key] = key in self._parents, parent
        if parent:
            self._children.link(parent, key)
            self._place(parent)
        dead = bool(parent) and (parent not in self._parents or parent in self._dead)
        if known:
            self._mark(key, dead)
            return
        if dead:
            self._dead.add(key)
        self._place(key)
        if key in self._children:  # they were dead as long as it was absent
            for child in self._children.of(key):
                self._mark(child, dead)

    def use(self, key: str) -> None:
        """A key was used; no effect if it is not here."""
        if key in self._parents:
            self._used(key)
            self._place(key)

    def remove(self, key: str) -> None:
        """A key has left, for whatever reason; no effect if it is not here."""
        if key not in self._parents:
            return
        self._leaves[self._group_of(key)].discard(key)
        self._left(key)
        self._unlink(key)
        del self._parents[key], self._ranks[key]
        self._dead.discard(key)
        for child in self._children.of(key):
            self._mark(child, True)

    def is_leaf(self, key: str) -> bool:
        """Whether no present key is a child of this one."""
        return key not in self._children

    def ancestors(self, key: str) -> Iterator[str]:
        """The present keys before this one in its chain, the nearest first."""
        while (key := self._parents.get(key, "")) in self._parents:
            yield key

    def order(self, stays: Callable[[str], bool] = never) -> Iterator[str]:
        """Keys in the order in which they should leave, each after all of its present descendants.

        The caller may stop at any one, and changes nothing meanwhile. O(log n) for each key taken or passed over.

        Args:
            stays: a key of which this is true does not leave, and neither do its ancestors.
        """
        groups = {group: position for position, group in enumerate((DEAD, *self._groups()))}
        heaps = {position: self._leaves[group] for group, position in groups.items()}
        queue: list[tuple[int, Any, str, int]] = []  # position of the group, rank, key, index in the heap or -1

        def look(position: int, index: int) -> None:
            entry = heaps[position].entry(index)
            if entry is not None:
                heapq.heappush(queue, (position, *entry, index))

        for position in heaps:
            look(position, 0)
        behind: dict[str, int] = {}  # children of a key that have not been taken
        while queue:
            position, _, key, index = heapq.heappop(queue)
            if index >= 0:
                look(position, 2 * index + 1)
                look(position, 2 * index + 2)
            if stays(key):
                continue
            yield key
            parent = self._parents[key]
            if parent in self._parents:
                behind[parent] = behind.get(parent, self._children.count(parent)) - 1
                if not behind[parent]:
                    heapq.heappush(queue, (groups[self._group_of(parent)], self._ranks[parent], parent, -1))

    @abc.abstractmethod
    def _arrive(self, key: str) -> None:
        """Gives a new key its rank."""

    @abc.abstractmethod
    def _used(self, key: str) -> None:
        """Gives a key that was used its new rank; it is in the heap of no other group afterwards."""

    def _left(self, key: str) -> None:  # noqa: B027  # few remember what was here
        """A key is about to leave."""

    def _group(self, key: str) -> int:
        """The group of a key that is not dead, of those that `_groups` names."""
        return 0

    def _groups(self) -> tuple[int, ...]:
        """Groups in the order in which they should leave; ranks compare within one."""
        return (0,)

    def _group_of(self, key: str) -> int:
        return DEAD if key in self._dead else self._group(key)

    def _place(self, key: str) -> None:
        """Has a key among the leaves of its group if it is a leaf."""
        if key in self._parents:
            heap = self._leaves[DEAD if key in self._dead else self._group(key)]
            if key in self._children:
                heap.discard(key)
            else:
                heap.put(key, self._ranks[key])

    def _unlink(self, key: str) -> None:
        parent = self._parents[key]
        if parent:
            self._children.unlink(parent, key)
            self._place(parent)

    def _mark(self, key: str, dead: bool) -> None:
        """Counts a key and its descendants as dead or not."""
        changing = [key]
        while changing:
            key = changing.pop()
            if (key in self._dead) != dead:
                self._leaves[self._group_of(key)].discard(key)
                (self._dead.add if dead else self._dead.discard)(key)
                self._place(key)
                changing += self._children.of(key)


class _Children(dict[str, str | set[str]]):
    """The present children of each key, which itself may be absent. Most have one, for which a set is too large."""

    def count(self, parent: str) -> int:
        children = self.get(parent, ())
        return 1 if isinstance(children, str) else len(children)

    def of(self, parent: str) -> tuple[str, ...]:
        children = self.get(parent, ())
        return (children,) if isinstance(children, str) else tuple(children)

    def link(self, parent: str, child: str) -> None:
        children = self.setdefault(parent, child)
        if isinstance(children, set):
            children.add(child)
        elif children != child:
            self[parent] = {children, child}

    def unlink(self, parent: str, child: str) -> None:
        children = self[parent]
        if isinstance(children, set):
            children.discard(child)
        if children == child or not children:
            del self[parent]


class FIFO(EvictionPolicy):
    """First in, first out: no use counts."""

    def _arrive(self, key: str) -> None:
        self._ranks[key] = next(self._clock)

    def _used(self, key: str) -> None:
        pass


class LRU(FIFO):
    """Least recently used first."""

    def _used(self, key: str) -> None:
        self._ranks[key] = next(self._clock)


class LFU(EvictionPolicy):
    """Least often used first, and of those the least recently used."""

    def _arrive(self, key: str) -> None:
        self._ranks[key] = (0, next(self._clock))

    def _used(self, key: str) -> None:
        self._ranks[key] = (self._ranks[key][0] + 1, next(self._clock))


class ARC(LRU):
    """Adaptive replacement (Megiddo and Modha, 2003): the keys used once and those used again, each in LRU order.

    What was thrown out is remembered for a while: a return says that its list was too short, and moves the border.
    """

    ONCE, AGAIN = 0, 1

    def __init__(self) -> None:
        super().__init__()
        self._again: set[str] = set()
        self._once_gone: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._again_gone: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._target = 0.0  # how many keys used once should be here

    def _arrive(self, key: str) -> None:
        super()._arrive(key)
        once_gone, again_gone = len(self._once_gone), len(self._again_gone)
        if key in self._once_gone:
            self._target = min(self._target + max(1.0, again_gone / once_gone), len(self) + 1)
            del self._once_gone[key]
            self._again.add(key)
        elif key in self._again_gone:
            self._target = max(self._target - max(1.0, once_gone / again_gone), 0.0)
            del self._again_gone[key]
            self._again.add(key)

    def _used(self, key: str) -> None:
        super()._used(key)
        if key not in self._again:
            self._leaves[self._group_of(key)].discard(key)
            self._again.add(key)

    def _left(self, key: str) -> None:
        (self._again_gone if key in self._again else self._once_gone)[key] = None
        self._again.discard(key)
        for gone in (self._once_gone, self._again_gone):
            while len(gone) > len(self):
                gone.popitem(last=False)

    def _group(self, key: str) -> int:
        return self.AGAIN if key in self._again else self.ONCE

    def _groups(self) -> tuple[int, ...]:
        longer = len(self) - len(self._again) > self._target
        return (self.ONCE, self.AGAIN) if longer else (self.AGAIN, self.ONCE)


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO, "arc": ARC}
