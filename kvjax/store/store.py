"""KV store: host memory in front of slower tiers, and the threads that move blocks between them.

    engine ──insert──> host memory ──write queue──> disk, remote ...     (after the request, in the background)
    engine <──load──── host memory <──load queue─── disk, remote ...     (while the request waits for its turn)

Whatever a tier does wrong costs a recompute and nothing else: every block is proven before it is ready, and no call of
the engine waits for a disk or a network. One mutex guards host memory and both queues; none of them does I/O under it.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.store.block import BlockLayout
from kvjax.store.block_writer import BlockWriter
from kvjax.store.config import StoreConfig
from kvjax.store.eviction import POLICIES
from kvjax.store.host import HostTier
from kvjax.store.keys import BlockKey
from kvjax.store.load_queue import LoadQueue
from kvjax.store.managed_tier import ManagedTier
from kvjax.store.planner import Planner
from kvjax.store.pool import DaemonPool
from kvjax.store.prefix_load import Chain, PrefixLoad
from kvjax.store.stats import HOST, Counters, TierStats
from kvjax.store.tier import Tier
from kvjax.store.write_queue import WriteQueue

logger = logging.getLogger(__name__)
CLOSING = 5.0  # seconds
LEAST_CLOSING = 0.2  # seconds for tiers to close, even where nothing is left of the time given


class KVStore:
    """Blocks of one layout, in tiers. Safe from any thread.

    Args:
        below: the tiers behind host memory, nearest first. They are the store's from now on.
    """

    def __init__(self, layout: BlockLayout, config: StoreConfig, below: Sequence[Tier] = ()) -> None:
        self.layout, self.config = layout, config
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._counters = Counters()
        self._writes = WriteQueue(config, self._counters, self._mutex, self._changed)
        policy = POLICIES[config.eviction_policy]()
        self._host = HostTier(config.host_cache_size, layout.nbytes, policy, self._writes.may_leave)
        self._loads = LoadQueue(layout, self._host, self._writes, self._counters, self._mutex, self._changed)
        self._set_tiers(below)

    @property
    def capacity(self) -> int:
        """Blocks that host memory holds at most."""
        return self._host.capacity

    @property
    def planner(self) -> Planner:
        """Measured rates of loading and computing; whoever computes reports to it."""
        return self._loads.planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._loads.planner = planner

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers below host memory, nearest first."""
        return tuple(tier.tier for tier in self._loads.tiers)

    def load(
        self,
        keys: Sequence[BlockKey],
        *,
        unit: int = 1,
        on_done: Callable[[], None] = lambda: None,
        chain: Chain | None = None,
    ) -> PrefixLoad:
        """Starts to bring a chain of blocks to host memory, as far as it is somewhere and worth it.

        Args:
            unit: blocks that count together; the chain is cut to a multiple of it.
            on_done: called, by a thread of the store and outside its locks, when nothing more is on its way.
            chain: where the dense chain ends after so many blocks, the keys to look for behind.
        """
        return self._loads.open(keys, unit, on_done, chain)

    def refresh(self, load: PrefixLoad) -> bool:
        """Looks again for what others have computed since a load was done; returns whether more is on its way.

        Only host memory is asked, where blocks that are being computed count: nothing waits for a tier.
        """
        return self._loads.refresh(load)

    def insert(self, keys: Sequence[BlockKey], *, tail: bool = False) -> BlockWriter:
        """Places in host memory for those of these blocks that are not there; the caller fills them.

        A block for which nothing may leave is not stored, and counted. Never waits.

        Args:
            tail: whether the last block is not full: tiers below get it once it was used, or with `flush`, for nearly
                every prompt has one and few come again.
        """
        with self._mutex:
            self._loads.reap()
            self._writes.release_finished()
            writer = BlockWriter(self.layout, keys, self._host, self._loads, self._writes, self._mutex, tail)
            lacking = sum(1 for key in keys if not (self._host.find(key.hex) or self._host.pending(key.hex)))
            if lacking:
                self._counters.add(HOST, "error full", lacking)
            return writer

    def flush(self, timeout: float) -> bool:
        """Writes what a tier below does not have yet; returns whether all is written within `timeout` seconds."""
        with self._mutex:
            self._writes.write_all()
            self._changed.wait_for(lambda: self._writes.idle, timeout)
            return self._writes.idle and self._writes.complete

    def wait(self, timeout: float) -> bool:
        """Whether nothing is being written, located or loaded within `timeout` seconds."""
        with self._mutex:
            return self._changed.wait_for(lambda: self._writes.idle and self._loads.idle, timeout)

    def close(self, timeout: float = CLOSING) -> bool:
        """Ends the threads and closes the tiers. No call may follow.

        Returns whether all has ended within about `timeout` seconds; what hangs is left to end by itself.
        """
        end = time.monotonic() + timeout

        def left() -> float:
            return max(end - time.monotonic(), 0.0)

        tiers = self._loads.tiers
        closed = dict.fromkeys((tier.name for tier in tiers), False)
        ended = self._loads.close(left())
        if tiers:  # side by side: a tier that hangs takes no time from another
            pool = DaemonPool(len(tiers), "kvjax-close")
            for tier in tiers:
                pool.submit(lambda tier=tier: closed.update({tier.name: tier.close(left())}))
            pool.wait_idle(left() + LEAST_CLOSING)
        self._host.close()  # gigabytes, for which nothing should wait until cycles are collected
        return ended and all(closed.values())

    def replace_tiers(self, below: Sequence[Tier]) -> tuple[Tier, ...]:
        """Goes on with other tiers below host memory; returns the former ones, which are not closed."""
        with self._mutex:
            former = self._loads.tiers
            self._set_tiers(below)
        for tier in former:
            tier.end_threads(CLOSING)
        return tuple(tier.tier for tier in former)

    def count_hits(self, sources: Sequence[str]) -> None:
        """A request uses blocks that came from these tiers."""
        for source in sources:
            self._counters.add(source, "hits")

    def checked(self, key: BlockKey, same: bool) -> None:
        """A layer of a stored block was computed again: is it the same?"""
        self._counters.add(HOST, "checked")
        if not same:
            logger.error("block %s is not what is computed now: purge the store, and report this", key.hex)
            self._counters.add(HOST, "error verify")

    def stats(self) -> dict[str, TierStats]:
        """What each tier holds and has done, nearest first."""
        with self._mutex:
            held = {HOST: self._host.held()}
        held |= {tier.name: tier.held() for tier in self._loads.tiers}
        return {name: self._stats(name, state) for name, state in held.items()}

    def check_integrity(self) -> None:
        """Raises AssertionError if an idle store holds a lease, or other than it says."""
        with self._mutex:
            assert self._writes.idle, "blocks are being written"
            assert self._loads.idle, "blocks are being loaded"
            assert not self._loads.count, "a load is left open"
            self._writes.release_finished()
            self._host.check_integrity()

    def _set_tiers(self, below: Sequence[Tier]) -> None:
        names: list[str] = []
        for tier in below:
            same = sum(name.rstrip("0123456789") == tier.name for name in names)
            names.append(tier.name if not same else f"{tier.name}{same + 1}")
        self._loads.tiers = tuple(
            ManagedTier(tier, name, self._counters) for tier, name in zip(below, names, strict=True)
        )
        self._writes.attach(self._host, self._loads.tiers)

    def _stats(self, name: str, held: dict[str, Any]) -> TierStats:
        counts, seconds = self._counters.of(name)
        return TierStats(
            hits=counts.get("hits", 0),
            loaded_bytes=counts.get("loaded", 0) * self.layout.nbytes,
            load_seconds=seconds,
            written=counts.get("written", 0),
            checked=counts.get("checked", 0),
            errors={key.removeprefix("error "): count for key, count in counts.items() if key.startswith("error ")},
            **held,
        )
