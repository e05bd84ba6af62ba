"""Write queue: takes blocks from host memory to the tiers below, and tells these of what was used.

Each tier has a queue of its own, of writes and touches in the order in which they came up. A block is written after its
parent, for without it nobody could use it. A touch tells a tier that a chain was used; what the tier has evicted
meanwhile is written to it again while host memory has it. Nothing here waits for a tier.
"""

import collections
import itertools
import logging
import threading
from collections.abc import Callable, Sequence

from kvjax.store.config import StoreConfig
from kvjax.store.host import HostBuffer, HostTier
from kvjax.store.managed_tier import WRITES, ManagedTier
from kvjax.store.stats import HOST, Counters
from kvjax.store.tier import TierError

logger = logging.getLogger(__name__)
MAX_JOBS = 1 << 16  # of a tier; of more the oldest are dropped and counted
TOUCH = "touch "
LOOK_AHEAD = 16  # jobs that are looked at for one that may begin


class WriteQueue:
    """Under the store's mutex, but for `_run`, which the threads of a tier call."""

    def __init__(
        self, config: StoreConfig, counters: Counters, mutex: threading.RLock, changed: threading.Condition
    ) -> None:
        self._config, self._counters, self._mutex, self._changed = config, counters, mutex, changed
        self._host: HostTier | None = None
        self._tiers: tuple[ManagedTier, ...] = ()
        # of each tier: keys to write, and chains to touch under the key of their last block
        self._jobs: dict[str, collections.OrderedDict[str, Sequence[str]]] = {}
        self._unwritten: collections.OrderedDict[str, None] = collections.OrderedDict()  # with write-back, oldest first
        self._running: collections.Counter[str] = collections.Counter()
        self._writing: set[tuple[str, str]] = set()  # tier and key
        self._early: set[tuple[str, str]] = set()  # those that were written while their parent still was
        self._held: list[tuple[threading.Event, Callable[[], None]]] = []

    def attach(self, host: HostTier, tiers: Sequence[ManagedTier]) -> None:
        """The host tier to write from, and the tiers to write to."""
        self._host, self._tiers = host, tuple(tiers)
        self._jobs = {tier.name: self._jobs.get(tier.name, collections.OrderedDict()) for tier in tiers}

    @property
    def idle(self) -> bool:
        return not any(self._jobs.values()) and not any(self._running.values())

    def sealed(self, buffer: HostBuffer) -> None:
        """A new block was computed."""
        buffer.missing = {tier.name for tier in self._tiers if tier.writable}
        self._counters.add(HOST, "written")
        self._consider(buffer)
        if buffer.missing and self._config.write_policy == "write_back":
            self._write_ahead(buffer)

    def loaded(self, buffer: HostBuffer, source: str) -> None:
        """A block came from a tier; those nearer should have it too, unless it leaves after its use."""
        buffer.transient = self._config.promotion == "temporary"
        names = [tier.name for tier in self._tiers]
        nearer = self._tiers[: names.index(source)] if source in names else ()
        buffer.missing = set() if buffer.transient else {tier.name for tier in nearer if tier.writable}
        self._consider(buffer)

    def used(self, chain: Sequence[HostBuffer]) -> None:
        """The blocks of one chain, from its beginning on, were used."""
        keys = tuple(buffer.key for buffer in chain)
        for tier in self._tiers:
            if tier.ordered and keys:
                self._submit(tier, TOUCH + keys[-1], keys)
        for buffer in chain:
            self._consider(buffer)

    def may_leave(self, buffer: HostBuffer) -> bool:
        """Whether host memory may evict a block: with write-back only once it is written."""
        late = [tier for tier in self._tiers if tier.name in buffer.missing]
        if not late or self._idle_tail(buffer):
            return True
        if self._config.write_policy == "write_back" and not all(tier.failing for tier in late):
            self._write(buffer)
            return False
        if any(buffer.key in self._jobs[tier.name] for tier in late) or self._config.write_policy == "write_back":
            self._counters.add(HOST, "error full")  # slower tiers do not keep up, and never get it
        return True

    def write_all(self) -> None:
        """Queues every block that a tier lacks."""
        assert self._host is not None
        for buffer in self._host.ready():
            self._write(buffer)

    @property
    def complete(self) -> bool:
        """Whether every tier has all that it should have."""
        assert self._host is not None
        names = {tier.name for tier in self._tiers}
        return not any(buffer.missing & names for buffer in self._host.ready())

    def hold(self, finished: threading.Event, then: Callable[[], None]) -> None:
        """Does `then`, under the mutex, some time after a call that was given up has finished."""
        self._held.append((finished, then))

    def release_finished(self) -> None:
        """Gives memory back that a call held which was given up, and which has finished meanwhile."""
        finished = [entry for entry in self._held if entry[0].is_set()]
        self._held = [entry for entry in self._held if not entry[0].is_set()]
        for _, then in finished:
            then()

    def _consider(self, buffer: HostBuffer) -> None:
        """Queues a block for the tiers that lack it, if the policy has it written now."""
        config = self._config
        if self._idle_tail(buffer):
            return
        selected = config.write_policy == "write_through_selective" and buffer.hits >= config.selective_hits
        if buffer.missing and (config.write_policy == "write_through" or selected):
            self._write(buffer)

    @staticmethod
    def _idle_tail(buffer: HostBuffer) -> bool:
        return buffer.tail and not buffer.hits

    def _write_ahead(self, buffer: HostBuffer) -> None:
        """Has the oldest of the blocks written that host memory alone has, so that never more than half of it are such.

        Otherwise nothing could leave for a new block before a tier below has taken one.
        """
        assert self._host is not None
        self._unwritten[buffer.key] = None
        while len(self._unwritten) > self._host.capacity // 2:
            oldest = self._host.find(self._unwritten.popitem(last=False)[0])
            if oldest is not None:
                self._write(oldest)

    def _write(self, buffer: HostBuffer) -> None:
        assert self._host is not None
        for tier in self._tiers:
            if tier.name not in buffer.missing:
                continue
            for ancestor in self._host.lineage(buffer.key) or [buffer]:
                if tier.name in ancestor.missing and (tier.name, ancestor.key) not in self._writing:
                    self._submit(tier, ancestor.key, ())

    def _submit(self, tier: ManagedTier, name: str, keys: Sequence[str]) -> None:
        jobs = self._jobs[tier.name]
        if name in jobs and not keys:
            return
        jobs[name] = keys
        jobs.move_to_end(name)
        if len(jobs) > MAX_JOBS:
            jobs.popitem(last=False)
            tier.count("error full")
        self._start(tier)

    def _start(self, tier: ManagedTier) -> None:
        if self._running[tier.name] < WRITES and self._jobs[tier.name] and tier.writes.submit(lambda: self._run(tier)):
            self._running[tier.name] += 1

    def _run(self, tier: ManagedTier) -> None:
        """Does the jobs of one tier until there are none, in a thread of the tier's own."""
        try:
            while True:
                with self._mutex:
                    self.release_finished()
                    name = self._next(tier)
                    if name is None:
                        return
                    keys = self._jobs[tier.name].pop(name)
                    buffer = None if keys else self._lease(tier, name)
                    self._start(tier)  # a second thread, where there is enough to do
                if keys:
                    self._touch(tier, keys)
                elif buffer is not None:
                    self._write_one(tier, buffer)
        finally:
            with self._mutex:
                self._running[tier.name] -= 1
                self._changed.notify_all()

    def _next(self, tier: ManagedTier) -> str | None:
        """The oldest job that may begin; None if there is none, or those there are wait for a write under way."""
        assert self._host is not None
        for name in itertools.islice(self._jobs.get(tier.name, ()), LOOK_AHEAD):
            buffer = self._host.find(name) if (tier.name, name) in self._early else None
            if buffer is None or (tier.name, buffer.parent) not in self._writing:
                return name
        return None

    def _lease(self, tier: ManagedTier, key: str) -> HostBuffer | None:
        """The block to write, leased; None if it has left, is there already, or its parent could not be written."""
        assert self._host is not None
        buffer = self._host.find(key)
        if buffer is None or tier.name not in buffer.missing:
            return None
        parent = self._host.find(buffer.parent)
        if parent is not None and tier.name in parent.missing and (tier.name, parent.key) not in self._writing:
            if parent.key in self._jobs[tier.name]:
                self._submit(tier, key, ())  # behind it
            else:
                tier.count("error parent")  # it was not written, and without it this block is of no use
            return None
        buffer.leases += 1
        self._writing.add((tier.name, key))
        return buffer

    def _write_one(self, tier: ManagedTier, buffer: HostBuffer) -> None:
        finished: threading.Event | None = None
        key, stored = buffer.key, False
        try:
            if not tier.tier.contains(key):  # another server may have written it
                tier.tier.write(key, memoryview(buffer.blob), buffer.parent)
                tier.count("written")
            stored = True
            tier.succeeded()
        except TierError as error:
            finished = error.finished
            tier.failed(error)
        except Exception as error:
            logger.exception("writing a block to the %s tier failed", tier.name)
            tier.failed(TierError("io", repr(error)))
        with self._mutex:
            self._writing.discard((tier.name, key))
            self._early.discard((tier.name, key))
            if stored and (tier.name, buffer.parent) in self._writing:
                # it was there before its parent, which may have evicted it: looked at again once that is written
                self._early.add((tier.name, key))
                self._submit(tier, key, ())
            elif stored:
                buffer.missing.discard(tier.name)
            self._start(tier)
            assert self._host is not None
            if finished is None:
                self._host.release(buffer)
            else:
                host = self._host
                self.hold(finished, lambda: host.release(buffer))
            self._changed.notify_all()

    def _touch(self, tier: ManagedTier, keys: Sequence[str]) -> None:
        there = tier.call(lambda: tier.tier.touch(keys), None)
        if there is None:
            return
        with self._mutex:
            assert self._host is not None
            for key, present in zip(keys, there, strict=True):
                buffer = self._host.find(key)
                if buffer is not None and not present:
                    buffer.missing.add(tier.name)
                    self._consider(buffer)
