"""Load queue: brings the blocks of waiting requests to host memory, in the order of their turn.

    open ──> admitted ──> located ──> loaded ──> closed
             (host memory  (nearest    (one load of a block, for all
              reserved)     tier first)  that wait for it)

Host memory is reserved for a whole request, so that those in the queue do not evict each other's blocks. A block that
another request is computing counts as on its way. Each tier is asked by threads of its own.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence

from kvjax.store.block import BlockLayout, CorruptBlockError
from kvjax.store.host import HostBuffer, HostTier
from kvjax.store.keys import BlockKey
from kvjax.store.managed_tier import ManagedTier
from kvjax.store.planner import Planner
from kvjax.store.pool import DaemonPool
from kvjax.store.prefix_load import Chain, PrefixLoad
from kvjax.store.stats import HOST, Counters
from kvjax.store.tier import TierError
from kvjax.store.write_queue import WriteQueue

logger = logging.getLogger(__name__)


class LoadQueue:
    """All loads of a store, oldest first. Methods whose names begin with `_` hold the mutex, but for `_find`, `_read`.

    Attributes:
        tiers: those below host memory, nearest first.
        planner: decides how much of a prefix is loaded.
    """

    def __init__(
        self,
        layout: BlockLayout,
        host: HostTier,
        writes: WriteQueue,
        counters: Counters,
        mutex: threading.RLock,
        changed: threading.Condition,
    ) -> None:
        self.tiers: tuple[ManagedTier, ...] = ()
        self.planner = Planner()
        self._layout, self._host, self._writes, self._counters = layout, host, writes, counters
        self._mutex, self._changed = mutex, changed
        self._loads: list[PrefixLoad] = []
        self._reserved: collections.Counter[str] = collections.Counter()  # keys of admitted loads
        self._waiting: dict[str, list[tuple[PrefixLoad, int]]] = {}  # loads that wait for each pending block
        self._reading = 0  # blocks on their way from a tier
        self._finding = 0  # look-ups under way
        self._callbacks = DaemonPool(1, "kvjax-loaded")  # outside the mutex, which the caller's locks may surround

    def open(
        self, keys: Sequence[BlockKey], unit: int, on_done: Callable[[], None], chain: Chain | None = None
    ) -> PrefixLoad:
        """Starts a load; see `KVStore.load`."""
        load = PrefixLoad(
            keys[: len(keys) // unit * unit],
            unit,
            self._mutex,
            lambda: self.planner,
            self._host.release,
            lambda: self._callback(on_done),
            self._used,
            self._closed,
            chain,
        )
        with self._mutex:
            self.reap()
            self._loads.append(load)
            self._admit()
        return load

    def refresh(self, load: PrefixLoad) -> bool:
        """Looks again for what others have computed; see `KVStore.refresh`."""
        with self._mutex:
            if load.stopped or load.closed:
                return False
            if load.done or not load.admitted:  # one without a place may use what is here all the same
                self._refresh(load)
            return not load.done

    def arrived(self, buffer: HostBuffer, source: str = HOST) -> None:
        """A pending block is ready: every load that waits for it gets a lease. Under the mutex."""
        buffer.ready = True
        waiting = self._waiting.pop(buffer.key, [])
        buffer.leases += len(waiting)
        for load, index in waiting:
            load.place(index, buffer, source)
            self._progress(load)
        self._changed.notify_all()

    def lost(self, key: str) -> None:
        """A pending block was given up. Under the mutex."""
        for load, index in self._waiting.pop(key, []):
            load.miss(index)
            load.settle()
        self._changed.notify_all()

    @property
    def idle(self) -> bool:
        """Whether nothing is being located or read. Under the mutex."""
        return not (self._reading or self._finding)

    @property
    def count(self) -> int:
        return len(self._loads)

    def reap(self) -> None:
        """Takes back the leases of loads that nothing was asked of for long: their request is lost. Under the mutex."""
        now = time.monotonic()
        for load in [load for load in self._loads if load.deadline < now]:
            logger.error("a load of %d blocks was never closed: its leases are taken back", len(load.keys))
            load.close()

    def close(self, timeout: float) -> bool:
        """Closes every load; returns whether the callbacks end within `timeout` seconds."""
        with self._mutex:
            for load in list(self._loads):
                load.close()
        return self._callbacks.close(timeout)

    def _callback(self, on_done: Callable[[], None]) -> None:
        self._callbacks.submit(on_done)

    # Admission.

    def _admit(self) -> None:
        """Reserves host memory for loads in the order of their turn; the first gets what there is, if it is less.

        Blocks that several requests use are reserved once.
        """
        for load in self._loads:
            if load.admitted or load.done:
                continue
            keys = {key.hex for key in load.dense_keys}
            if self._reserved and len(keys | self._reserved.keys()) > self._host.capacity:
                return
            self._reserved.update(keys)
            load.admit()
            self._lease(load, 0)
            self._locate(load)

    def _used(self, chain: Sequence[HostBuffer]) -> None:
        self._host.use(chain)
        self._writes.used(chain)

    def _closed(self, load: PrefixLoad) -> None:
        self._loads.remove(load)
        if load.admitted:
            self._reserved -= collections.Counter({key.hex for key in load.dense_keys})
        if load.stopped and load.keys and not load.admitted:
            self._counters.add(HOST, "error no place")
        self._admit()

    # Location.

    def _lease(self, load: PrefixLoad, first: int) -> None:
        """Leases what host memory has of a chain from block `first` on."""
        for index in range(first, len(load.keys)):
            buffer = self._host.find(load.keys[index].hex)
            if buffer is not None and load.buffers[index] is None:
                buffer.leases += 1
                load.buffers[index] = buffer

    def _here(self, load: PrefixLoad, first: int) -> int:
        """Blocks from `first` on that are in host memory or on their way there, without a gap."""
        index = first
        while index < len(load.keys) and (load.buffers[index] is not None or self._host.pending(load.keys[index].hex)):
            index += 1
        return index - first

    def _locate(self, load: PrefixLoad, tier: int = 0) -> None:
        """Goes on locating a chain behind what is located: in host memory, then in the tiers from number `tier` on."""
        if load.done:
            return
        here = self._here(load, len(load.sources))
        if here:
            load.sources += [HOST] * here
            tier = 0
        self._pull(load)
        if len(load.sources) >= min(load.limit, len(load.keys)):
            self._located(load)
        elif tier < len(self.tiers):
            self._finding += 1
            keys = [key.hex for key in load.keys[len(load.sources) :]]
            chain = load.keys
            if not self.tiers[tier].lookups.submit(lambda: self._find(load, chain, keys, tier)):
                self._finding -= 1
                self._located(load)
        else:
            self._chain_ends(load)

    def _find(self, load: PrefixLoad, chain: Sequence[BlockKey], keys: Sequence[str], number: int) -> None:
        """Asks one tier for a chain, in a thread of the tier's own."""
        tier = self.tiers[number] if number < len(self.tiers) else None
        count = 0
        try:
            count = 0 if tier is None else tier.extent(keys, lambda: load.done)
        finally:
            with self._mutex:
                self._finding -= 1
                if not load.done and load.keys is chain:
                    if count and tier is not None:
                        load.sources += [tier.name] * count
                        self._locate(load)
                    else:
                        self._locate(load, number + 1)
                self._changed.notify_all()

    def _chain_ends(self, load: PrefixLoad) -> None:
        """Nothing of the dense chain lies anywhere from here on: generated blocks may follow."""
        end = len(load.sources) // load.unit * load.unit
        if load.chain is None or load.dense_prefix_length < len(load.dense_keys):
            self._located(load)
            return
        load.switch_chain(end, load.chain(end)[: len(load.dense_keys) - end])
        self._lease(load, end)
        self._locate(load)

    def _located(self, load: PrefixLoad) -> None:
        del load.sources[len(load.sources) // load.unit * load.unit :]
        load.end_location()
        load.settle()

    def _refresh(self, load: PrefixLoad) -> None:
        """Extends a load that is done by what host memory has now."""
        whole = load.whole
        if whole <= load.dense_prefix_length < len(load.dense_keys):  # no generated block is used: dense ones first
            load.switch_chain(whole, load.dense_keys[whole:])
            load.dense_prefix_length = len(load.dense_keys)
        here = self._extend(load, whole)
        if load.chain is not None and load.dense_prefix_length == len(load.dense_keys) > whole + here:
            end = (whole + here) // load.unit * load.unit
            load.switch_chain(end, load.chain(end)[: len(load.dense_keys) - end])
            here = end - whole + self._extend(load, end)
        if here:
            load.reopen([HOST] * here)
            self._pull(load)
        load.located = True
        load.settle()

    def _extend(self, load: PrefixLoad, first: int) -> int:
        self._lease(load, first)
        return self._here(load, first)

    # Loading.

    def _pull(self, load: PrefixLoad) -> None:
        """Chooses how much is worth loading, and asks for the blocks whose time has come."""
        whole = load.whole
        ahead = load.sources[whole : load.limit]
        worth = self.planner.choose(ahead, whole)
        if worth < len(ahead):
            load.limit = whole + worth // load.unit * load.unit
            self._probe(load.keys[whole + worth], load.sources[whole + worth])
        for index in load.due():
            key, source = load.keys[index], load.sources[index]
            buffer = self._host.find(key.hex)
            if buffer is not None:
                buffer.leases += 1
                load.place(index, buffer, HOST)
            elif self._host.pending(key.hex):
                self._waiting.setdefault(key.hex, []).append((load, index))
            elif source == HOST or not self._begin_read(key, source):
                load.miss(index)  # it left meanwhile, or nothing may leave for it
            else:
                self._waiting.setdefault(key.hex, []).append((load, index))
        self._measure(load)

    def _measure(self, load: PrefixLoad) -> None:
        """Tells the planner how long the last blocks took, where a tier had them."""
        measured = load.measure()
        if measured is not None and measured[0] != HOST:
            self.planner.loaded(*measured)

    def _progress(self, load: PrefixLoad) -> None:
        """A block has come: is the rest still worth it?"""
        self._measure(load)
        self._pull(load)
        load.settle()

    def _probe(self, key: BlockKey, source: str) -> None:
        """Measures a tier that was passed over by a load that nothing waits for."""
        if source != HOST and self.planner.probe(source) and not self._host.pending(key.hex):
            self._begin_read(key, source, probe=True)

    def _begin_read(self, key: BlockKey, source: str, *, probe: bool = False) -> bool:
        """Has a thread of a tier read a block; False where host memory has no place for it."""
        self._writes.release_finished()
        number = next((number for number, tier in enumerate(self.tiers) if tier.name == source), None)
        buffer = None if number is None else self._host.take(key.hex, key.previous.hex())
        if number is None or buffer is None:
            return False
        self._reading += 1
        if not self.tiers[number].loads.submit(lambda: self._read(key, buffer, number, probe)):
            self._give_up(key, buffer)
            return False
        return True

    def _read(self, key: BlockKey, buffer: HostBuffer, number: int, probe: bool) -> None:
        """Fills a buffer from one tier, in a thread of the tier's own; another tier goes on where it cannot."""
        tier, began = self.tiers[number], time.monotonic()
        error: TierError | None = None
        good = False
        try:
            good = tier.tier.read(key.hex, memoryview(buffer.blob))
            if good:
                self._layout.check(buffer.blob, key)
        except CorruptBlockError as harmed:
            good = False
            logger.warning("a block in the %s tier is harmed and is removed: %s", tier.name, harmed)
            tier.count("error corrupt")
            tier.call(lambda: tier.tier.reject(key.hex), None)
        except TierError as failure:
            good, error = False, failure
            tier.failed(failure)
            if failure.reason == "length":
                tier.call(lambda: tier.tier.reject(key.hex), None)
        except Exception as broken:
            good, error = False, TierError("io", repr(broken))
            logger.exception("the %s tier raised what no tier may", tier.name)
            tier.failed(error)
        took = time.monotonic() - began
        if good:
            tier.loaded(took)
        with self._mutex:
            if probe and good:
                self.planner.loaded(tier.name, took)
            if good:
                self._reading -= 1
                self._writes.loaded(buffer, tier.name)
                self.arrived(buffer, tier.name)
                self._host.release(buffer)
            elif error is not None and error.finished is not None:  # the call may still write to this memory
                self._reading -= 1
                self._host.quarantine(buffer)
                self._writes.hold(error.finished, lambda: self._host.readmit(buffer))
                self.lost(key.hex)
            elif number + 1 < len(self.tiers) and self.tiers[number + 1].loads.submit(
                lambda: self._read(key, buffer, number + 1, probe)
            ):
                pass
            else:
                self._give_up(key, buffer)
            self._changed.notify_all()

    def _give_up(self, key: BlockKey, buffer: HostBuffer) -> None:
        self._reading -= 1
        self._host.release(buffer)
        self.lost(key.hex)
