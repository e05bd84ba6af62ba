"""Buffers: never more than fit, never given away while somebody reads them."""

import gc
import itertools
import weakref

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvjax.store.block import PAGE
from kvjax.store.eviction import LRU, POLICIES
from kvjax.store.host import HostTier


def host(buffers: int, block_bytes: int = 5000) -> HostTier:
    return HostTier(buffers * 2 * PAGE, block_bytes, LRU())


def put(tier: HostTier, key: str) -> bool:
    buffer = tier.take(key)
    if buffer is None:
        return False
    buffer.ready = True
    tier.release(buffer)
    return True


def test_memory_is_cut_into_whole_pages_and_never_more_than_asked_for():
    tier = HostTier(10 * PAGE, PAGE + 1, LRU())
    assert tier.capacity == 5
    buffers = [tier.take(str(number)) for number in range(6)]
    assert buffers.pop() is None
    places = sorted(buffer.blob.ctypes.data for buffer in buffers)
    assert all(place % PAGE == 0 for place in places)
    assert {b - a for a, b in itertools.pairwise(places)} == {2 * PAGE}
    assert HostTier(PAGE, PAGE + 1, LRU()).take("a") is None
    assert HostTier(0, PAGE, LRU()).capacity == 0


def test_closed_it_gives_the_memory_back_with_the_last_lease():
    tier = host(3)
    put(tier, "a")
    held = tier.take("b")
    assert held is not None
    memory = weakref.ref(held.blob.base)
    gc.disable()  # engines are in cycles, and gigabytes do not wait for their collection
    try:
        tier.close()
        assert memory() is not None
        del held
        assert memory() is None
    finally:
        gc.enable()


def test_the_oldest_leaves_unless_somebody_holds_it():
    tier = host(2)
    assert put(tier, "a")
    assert put(tier, "b")
    held = tier.find("a")
    held.leases += 1
    assert put(tier, "c")
    assert tier.find("b") is None
    assert tier.find("a") is held
    tier.find("c").leases += 1
    assert not put(tier, "d"), "all are held"
    tier.release(held)
    assert put(tier, "d")
    assert tier.evictions == 2


def test_what_is_being_written_is_not_found_and_is_gone_if_given_up():
    tier = host(2)
    buffer = tier.take("a")
    assert tier.find("a") is None
    assert tier.take("a") is None, "one writer a block"
    tier.release(buffer)
    assert len(tier) == 0
    assert put(tier, "a")
    tier.check_integrity()


def test_a_lease_is_given_back_once():
    tier = host(1)
    buffer = tier.take("a")
    buffer.ready = True
    tier.release(buffer)
    with pytest.raises(AssertionError, match="twice"):
        tier.release(buffer)


class Buffers(RuleBasedStateMachine):
    """Any order of takes, leases and releases, against plain sets."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), buffers=st.integers(1, 5))
    def start(self, policy, buffers):
        self.tier = HostTier(buffers * 2 * PAGE, 5000, POLICIES[policy]())
        self.writing, self.held = [], []

    @rule(key=st.integers(0, 9))
    def take(self, key):
        buffer = self.tier.take(str(key), str(key // 2) if key else "")  # a tree of chains
        if buffer is not None:
            assert buffer not in self.held
            assert buffer not in self.writing
            buffer.blob[:] = key
            self.writing.append(buffer)

    @rule(whole=st.booleans())
    def finish(self, whole):
        if self.writing:
            buffer = self.writing.pop()
            buffer.ready = whole
            self.tier.release(buffer)

    @rule(key=st.integers(0, 9))
    def lease(self, key):
        buffer = self.tier.find(str(key))
        if buffer is not None:
            self.tier.use(self.tier.lineage(buffer.key))
            buffer.leases += 1
            self.held.append(buffer)

    @rule()
    def give_back(self):
        if self.held:
            self.tier.release(self.held.pop(0))

    @rule(key=st.integers(0, 9))
    def discard(self, key):
        buffer = self.tier.find(str(key))
        if buffer is not None:
            buffer.leases, buffer.transient = buffer.leases + 1, True
            self.tier.release(buffer)

    @invariant()
    def what_is_held_stays(self):
        if hasattr(self, "tier"):
            assert all((buffer.blob == int(buffer.key)).all() for buffer in (*self.held, *self.writing))
            assert self.tier.used_bytes <= self.tier.capacity * self.tier.stride

    def teardown(self):
        if hasattr(self, "tier"):
            while self.writing:
                self.finish(whole=True)
            while self.held:
                self.give_back()
            self.tier.check_integrity()


TestBuffers = Buffers.TestCase
