"""The store: one host tier in front of slower ones, threads that move blocks between them, and one lock.

    engine --save--> host tier --write--> disk, remote           (after the request, in the background)
    engine <-fetch-- host tier <--load--- disk, remote           (while the request waits for its turn)

Whatever a tier does wrong costs a recompute and nothing else: every block is proven before it is ready, and no call of
the engine waits for a disk or a network.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvjax.store.block import BlockLayout, CorruptBlockError
from kvjax.store.block_writer import BlockWriter
from kvjax.store.config import StoreConfig
from kvjax.store.eviction import POLICIES
from kvjax.store.host import HostBuffer, HostTier
from kvjax.store.keys import BlockKey
from kvjax.store.locate import HOST, locate
from kvjax.store.planner import Planner
from kvjax.store.prefix_load import PrefixLoad, slowest
from kvjax.store.stats import Counters, TierStats
from kvjax.store.tier import Tier, TierError

logger = logging.getLogger(__name__)
Fork = Callable[[int], Sequence[BlockKey]]
LOADERS, WRITERS = 4, 2  # threads
ROOM_WAIT = 5.0


class KVStore:
    """Blocks of one format, in tiers.

    Args:
        below: the tiers behind host memory, nearest first. They are the store's from now on.

    Attributes:
        mutex: guards the host tier and every fetch.
    """

    def __init__(self, format: BlockLayout, config: StoreConfig, below: Sequence[Tier] = ()) -> None:
        self.format, self.config, self.below = format, config, tuple(below)
        self.mutex = threading.RLock()
        self.planner = Planner()
        self._idle = threading.Condition(self.mutex)
        self._host = HostTier(config.host_cache_size, format.nbytes, POLICIES[config.eviction_policy](), self._leaving)
        self._counters = Counters()
        self._fetches: set[PrefixLoad] = set()
        self._loading: dict[str, list[tuple[PrefixLoad, int]]] = {}  # who waits for each block that is being loaded
        self._backlog: dict[str, None] = {}  # keys to write as soon as others are written, oldest first
        self._writing = 0
        self._most_writes = max(self._host.capacity // 2, 1)  # at once: each holds a lease
        self._loaders = ThreadPoolExecutor(LOADERS, "kvjax-load")
        self._writers = ThreadPoolExecutor(WRITERS, "kvjax-write")

    @property
    def capacity(self) -> int:
        """Blocks that the host tier holds at most."""
        return self._host.capacity

    def fetch(
        self,
        names: Sequence[BlockKey],
        *,
        unit: int,
        on_done: Callable[[], None] = lambda: None,
        fork: Fork | None = None,
    ) -> PrefixLoad:
        """Starts to bring a chain of blocks to host memory, as far as it is there and worth it.

        Args:
            unit: blocks of a chunk; the chain is cut to whole chunks.
            on_done: called, from any thread, when nothing more will come.
            fork: where the chain ends after so many blocks, the names to look for behind, as many as are missing.
        """
        fetch = PrefixLoad(self, names[: len(names) // unit * unit], unit, on_done)
        with self.mutex:
            self._fetches.add(fetch)
            held = self._lease(fetch, 0)
            fetch.tiers = [HOST] * held
        if held < len(fetch.names) and self.below:
            self._loaders.submit(self._locate, fetch, fork)
            return fetch
        if held < len(fetch.names) and fork is not None:
            self._turn(fetch, held // unit * unit, fork)
        with self.mutex:
            fetch.tiers = [HOST] * len(fetch.names)
            fetch.limit = fetch.held
            fetch.settle()
        return fetch

    def save(self, names: Sequence[BlockKey]) -> BlockWriter:
        """Places in host memory for those of these blocks that are not there; whoever saves fills them.

        With write-back it may wait for older blocks to be written first, but no longer than `ROOM_WAIT` seconds.
        """
        deadline = time.monotonic() + ROOM_WAIT
        buffers = []
        with self.mutex:
            self._reap()
            for name in names:
                while (buffer := self._host.take(name.hex)) is None:
                    here, left = self._host.holds(name.hex), deadline - time.monotonic()
                    if here or self.config.write_policy != "write_back" or not self._writing or left <= 0:
                        if not here:
                            self._counters.add(HOST, "error full")
                        break
                    self._idle.wait(left)
                buffers.append(buffer)
        return BlockWriter(self, names, buffers)

    def flush(self, timeout: float) -> bool:
        """Writes what a tier below does not have yet; returns whether all is written within `timeout` seconds."""
        with self.mutex:
            for buffer in self._host.ready():
                if buffer.dirty:
                    self._write(buffer)
            written = self._idle.wait_for(lambda: not (self._writing or self._backlog), timeout)
            return written and not any(buffer.dirty for buffer in self._host.ready())

    def wait(self, timeout: float) -> bool:
        """Waits until nothing is being written or loaded; returns whether that came within `timeout` seconds."""
        with self.mutex:
            return self._idle.wait_for(lambda: not (self._writing or self._backlog or self._loading), timeout)

    def close(self) -> None:
        """Ends the threads, which finish what they have begun, and closes the tiers. No call may follow."""
        with self.mutex:
            for fetch in list(self._fetches):
                fetch.close()
        self._loaders.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        for tier in self.below:
            tier.close()
        self._host.close()  # gigabytes, for which nobody should wait until cycles are collected

    def stats(self) -> dict[str, TierStats]:
        """What each tier holds and has done."""
        tiers = {}
        for name in (HOST, *(tier.name for tier in self.below)):
            counts, seconds = self._counters.of(name)
            reasons = {key.removeprefix("error "): count for key, count in counts.items() if key.startswith("error ")}
            tiers[name] = TierStats(
                hits=counts.get("hits", 0),
                loaded_bytes=counts.get("loaded", 0) * self.format.nbytes,
                load_seconds=seconds,
                written=counts.get("written", 0),
                checked=counts.get("checked", 0),
                errors=reasons,
                **self._held(name),
            )
        return tiers

    def check_integrity(self) -> None:
        """Raises AssertionError if an idle store holds a lease, or other than it says."""
        with self.mutex:
            assert not self._loading
            assert not self._writing
            assert not self._fetches, "a fetch is left open"
            self._host.check_integrity()

    # What fetches and savings call.

    def release(self, buffer: HostBuffer) -> None:
        """Gives a lease back."""
        with self.mutex:
            self._host.release(buffer)
            if self.config.promotion == "temporary" and buffer.leases == 0 and buffer.passing:
                self._host.discard(buffer.key)

    def forget(self, fetch: PrefixLoad) -> None:
        """A fetch has been closed."""
        self._fetches.discard(fetch)

    def count_hits(self, tiers: Sequence[str]) -> None:
        """A request uses blocks that were found in these tiers."""
        for tier in tiers:
            self._counters.add(tier, "hits")

    def checked(self, name: BlockKey, same: bool) -> None:
        """A layer of a stored block was computed again: is it the same?"""
        self._counters.add(HOST, "checked")
        if not same:
            logger.error("block %s is not what is computed now: purge the store, and report this", name.hex)
            self._counters.add(HOST, "error verify")

    def saved(self, buffer: HostBuffer) -> None:
        """A new block is ready."""
        with self.mutex:
            buffer.ready, buffer.dirty = True, any(not tier.read_only for tier in self.below)
            self._counters.add(HOST, "written")
            self._consider(buffer)

    def _lease(self, fetch: PrefixLoad, first: int) -> int:
        """Leases what the host tier has of the blocks from `first` on; returns how many a fetch holds without a gap."""
        for index in reversed(range(first, len(fetch.names))):  # the last one first: the beginning shall leave last
            buffer = self._host.find(fetch.names[index].hex)
            if buffer is not None:
                self._host.use(buffer)
                buffer.leases += 1
                fetch.buffers[index] = buffer
                self._consider(buffer)
        return fetch.held

    def _turn(self, fetch: PrefixLoad, end: int, fork: Fork) -> None:
        """The chain of a fetch ends after `end` blocks; it goes on with another one."""
        names = fork(end)[: len(fetch.names) - end]
        with self.mutex:
            if fetch.turn(end, names):
                self._lease(fetch, end)
                self._host.touch(fetch.buffers[:end])

    # Loading: worker threads.

    def _locate(self, fetch: PrefixLoad, fork: Fork | None) -> None:
        """Where is the chain, how much of it is worth loading? Then each missing block is loaded."""
        try:
            tiers = self._find(fetch, 0)
            if len(tiers) < len(fetch.names) and fork is not None:
                self._turn(fetch, len(tiers), fork)
                tiers += self._find(fetch, len(tiers))
        except Exception:
            logger.exception("looking for stored blocks failed")
            tiers = []
        with self.mutex:
            if fetch.done:  # its request has taken what there was, and counts on it
                return
            chunks = [slowest(tiers[start : start + fetch.unit]) for start in range(0, len(tiers), fetch.unit)]
            fetch.tiers, fetch.limit = tiers, min(fetch.limit, self.planner.choose(chunks) * fetch.unit)
            self._ask(fetch)
            fetch.settle()

    def _ask(self, fetch: PrefixLoad) -> None:
        """Has those blocks loaded whose time has come."""
        for index in fetch.due():
            waiting = self._loading.setdefault(fetch.names[index].hex, [])
            waiting.append((fetch, index))
            if len(waiting) == 1:
                self._loaders.submit(self._load, fetch.names[index])

    def _find(self, fetch: PrefixLoad, first: int) -> list[str]:
        """The tier of each block from `first` on, for as many whole chunks as are somewhere."""
        with self.mutex:
            names, here = fetch.names[first:], [buffer is not None for buffer in fetch.buffers[first:]]
        tiers = locate(names, here, self.below, self._contains, lambda: fetch.closed)
        return tiers[: len(tiers) // fetch.unit * fetch.unit]

    def _contains(self, tier: Tier, name: BlockKey) -> bool:
        try:
            return tier.contains(name.hex)
        except TierError as error:
            self._failed(tier, error)
            return False

    def _load(self, name: BlockKey) -> None:
        """Loads one block for everybody who waits for it."""
        key, tier, buffer = name.hex, HOST, None
        try:
            with self.mutex:
                buffer = self._host.find(key)
                if buffer is not None:
                    buffer.leases += 1
                elif any(fetch.wants(index) for fetch, index in self._loading[key]):
                    self._reap()
                    buffer = self._host.take(key)
            if buffer is not None and not buffer.ready:
                tier = self._read(name, buffer)
        except Exception:
            logger.exception("loading a block failed")
            tier = ""
        with self.mutex:
            waiting = self._loading.pop(key)
            if buffer is not None and tier:
                buffer.leases += len(waiting)
            for fetch, index in waiting:
                if buffer is not None and tier:
                    fetch.place(index, buffer, tier)
                    self._ask(fetch)
                else:
                    fetch.miss(index)
            if buffer is not None:
                self.release(buffer)
            self._idle.notify_all()

    def _read(self, name: BlockKey, buffer: HostBuffer) -> str:
        """Fills a buffer from the nearest tier that has the block unharmed; returns its name, "" if there is none."""
        for tier in self.below:
            began = time.monotonic()
            try:
                if not tier.read(name.hex, memoryview(buffer.blob)):
                    continue
                self.format.check(buffer.blob, name)
            except TierError as error:
                self._failed(tier, error)
                if error.reason == "length":
                    self._remove(tier, name)
                continue
            except CorruptBlockError as error:
                logger.warning("a block in the %s tier is harmed and is removed: %s", tier.name, error)
                self._counters.add(tier.name, "error corrupt")
                self._remove(tier, name)
                continue
            self._counters.took(tier.name, time.monotonic() - began)
            self._counters.add(tier.name, "loaded")
            with self.mutex:
                nearer = self.below[: self.below.index(tier)]
                buffer.ready, buffer.passing = True, self.config.promotion == "temporary"
                buffer.dirty = not buffer.passing and any(not each.read_only for each in nearer)
                self._consider(buffer)
            return tier.name
        return ""

    def _remove(self, tier: Tier, name: BlockKey) -> None:
        if tier.read_only:
            return
        try:
            tier.delete(name.hex)
        except TierError as error:
            self._failed(tier, error)

    # Writing: worker threads.

    def _consider(self, buffer: HostBuffer) -> None:
        """Writes a block to the tiers below if its time has come."""
        config = self.config
        selected = config.write_policy == "write_through_selective" and buffer.hits >= config.selective_hits
        if buffer.dirty and (config.write_policy == "write_through" or selected):
            self._write(buffer)

    def _leaving(self, buffer: HostBuffer) -> bool:
        """The host tier wants to let a block go: may it?"""
        if buffer.dirty and self.config.write_policy == "write_back":
            self._write(buffer)
            return False  # once it is written
        if self._backlog.pop(buffer.key, "") is None:
            self._counters.add(HOST, "error full")  # slower tiers do not keep up, and never get it
        return True

    def _write(self, buffer: HostBuffer) -> None:
        """Writes a block to the tiers below, now or when its turn comes."""
        if buffer.writing:
            return
        if self._writing >= self._most_writes:
            self._backlog[buffer.key] = None
            return
        self._backlog.pop(buffer.key, None)
        buffer.leases, buffer.writing = buffer.leases + 1, True
        self._writing += 1
        self._writers.submit(self._write_below, buffer)

    def _write_below(self, buffer: HostBuffer) -> None:
        written = True
        for tier in self.below:
            if tier.read_only:
                continue
            try:
                if tier.contains(buffer.key):  # this server has loaded it from there, or another one wrote it
                    continue
                tier.write(buffer.key, memoryview(buffer.blob))
                self._counters.add(tier.name, "written")
            except TierError as error:
                written = False
                self._failed(tier, error)
            except Exception:
                written = False
                logger.exception("writing a block to the %s tier failed", tier.name)
        with self.mutex:
            buffer.dirty, buffer.writing = not written, False
            self._writing -= 1
            self.release(buffer)
            while self._backlog and self._writing < self._most_writes:
                waiting = self._host.find(next(iter(self._backlog)))
                if waiting is None:
                    self._backlog.pop(next(iter(self._backlog)))
                else:
                    self._write(waiting)
            self._idle.notify_all()

    def _failed(self, tier: Tier, error: TierError) -> None:
        self._counters.add(tier.name, f"error {error.reason}")
        logger.debug("%s tier: %s", tier.name, error)

    def _reap(self) -> None:
        """Takes back the leases of fetches that nobody has asked for anything for long: their holder is lost."""
        now = time.monotonic()
        for fetch in [fetch for fetch in self._fetches if fetch.deadline < now]:
            logger.error("a fetch of %d blocks was never closed: its leases are taken back", len(fetch.names))
            fetch.close()

    def _held(self, name: str) -> dict[str, Any]:
        if name == HOST:
            with self.mutex:
                return self._host.held()
        tier = next(tier for tier in self.below if tier.name == name)
        return tier.held()
