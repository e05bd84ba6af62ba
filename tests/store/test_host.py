"""Slabs: never more than fit, never given away while somebody reads them."""

import gc
import itertools
import weakref

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvjax.store.block import PAGE
from kvjax.store.eviction import LRU, POLICIES
from kvjax.store.host import HostTier


def host(slabs: int, block_bytes: int = 5000) -> HostTier:
    return HostTier(slabs * 2 * PAGE, block_bytes, LRU())


def put(tier: HostTier, key: str) -> bool:
    slab = tier.take(key)
    if slab is None:
        return False
    slab.ready = True
    tier.release(slab)
    return True


def test_memory_is_cut_into_whole_pages_and_never_more_than_asked_for():
    tier = HostTier(10 * PAGE, PAGE + 1, LRU())
    assert tier.capacity == 5
    slabs = [tier.take(str(number)) for number in range(6)]
    assert slabs.pop() is None
    places = sorted(slab.blob.ctypes.data for slab in slabs)
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
    slab = tier.take("a")
    assert tier.find("a") is None
    assert tier.take("a") is None, "one writer a block"
    tier.release(slab)
    assert len(tier) == 0
    assert put(tier, "a")
    tier.check_integrity()


def test_a_lease_is_given_back_once():
    tier = host(1)
    slab = tier.take("a")
    slab.ready = True
    tier.release(slab)
    with pytest.raises(AssertionError, match="twice"):
        tier.release(slab)


class Slabs(RuleBasedStateMachine):
    """Any order of takes, leases and releases, against plain sets."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)), slabs=st.integers(1, 5))
    def start(self, policy, slabs):
        self.tier = HostTier(slabs * 2 * PAGE, 5000, POLICIES[policy]())
        self.writing, self.held = [], []

    @rule(key=st.integers(0, 9))
    def take(self, key):
        slab = self.tier.take(str(key))
        if slab is not None:
            assert slab not in self.held
            assert slab not in self.writing
            slab.blob[:] = key
            self.writing.append(slab)

    @rule(whole=st.booleans())
    def finish(self, whole):
        if self.writing:
            slab = self.writing.pop()
            slab.ready = whole
            self.tier.release(slab)

    @rule(key=st.integers(0, 9))
    def lease(self, key):
        slab = self.tier.find(str(key))
        if slab is not None:
            self.tier.use(slab)
            slab.leases += 1
            self.held.append(slab)

    @rule()
    def give_back(self):
        if self.held:
            self.tier.release(self.held.pop(0))

    @rule(key=st.integers(0, 9))
    def discard(self, key):
        self.tier.discard(str(key))

    @invariant()
    def what_is_held_stays(self):
        if hasattr(self, "tier"):
            assert all((slab.blob == int(slab.key)).all() for slab in (*self.held, *self.writing))
            assert self.tier.used_bytes <= self.tier.capacity * self.tier.stride

    def teardown(self):
        if hasattr(self, "tier"):
            while self.writing:
                self.finish(whole=True)
            while self.held:
                self.give_back()
            self.tier.check_integrity()


TestSlabs = Slabs.TestCase
