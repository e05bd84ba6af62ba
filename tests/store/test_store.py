"""The store: what was saved is found, whole or not at all, wherever it went meanwhile and whatever went wrong there."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kvjax.store.disk import DiskTier
from kvjax.store.store import KVStore
from kvjax.store.tier import Tier, TierError
from tests.store.chains import FORMAT, blob_of, holds, kv_of, names_of, save, store_of
from tests.store.memory_tier import MemoryTier


class FarTier(MemoryTier):
    """Counts what it is asked, may be slow, and fails as it is told."""

    def __init__(self, name: str = "remote", seconds: float = 0.0) -> None:
        super().__init__()
        self.name, self.seconds = name, seconds
        self.reads: list[str] = []
        self.fails: type[BaseException] | None = None

    def read(self, key: str, into: memoryview) -> bool:
        self.reads.append(key)
        time.sleep(self.seconds)
        if self.fails is TierError:
            raise TierError("io", "told to fail")
        if self.fails is not None:
            raise self.fails
        return super().read(key, into)


@pytest.fixture
def opened():
    stores = []

    def open_store(*below: Tier, **settings) -> KVStore:
        stores.append(store_of(*below, **settings))
        return stores[-1]

    yield open_store
    for store in stores:
        assert store.wait(10.0)
        store.check_integrity()
        store.close()


def found(store: KVStore, names, unit: int = 1) -> int:
    """How many blocks a fetch brings, each of which is looked at."""
    done = threading.Event()
    with store.load(names, unit=unit, on_done=done.set) as fetch:
        assert done.wait(10)
        for index in range(fetch.loaded):
            assert holds(fetch.blob(index), names[index])
        return fetch.loaded


def put(tier: Tier, names) -> None:
    for name in names:
        tier.write(name.hex, memoryview(blob_of(name)))


def wait_until(condition, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_what_was_saved_is_found_up_to_the_first_difference(opened):
    store, names = opened(), names_of(4)
    save(store, names)
    assert found(store, names) == 4
    assert found(store, names_of(4, seed=9)) == 0, "another prompt"
    assert found(store, [*names[:2], *names_of(2, seed=1)]) == 2
    assert found(store, names[1:]) == 3
    assert found(store, []) == 0


def test_only_whole_chunks_are_found(opened):
    store, names = opened(), names_of(5)
    save(store, names)
    assert [found(store, names[:count], unit=2) for count in range(6)] == [0, 0, 2, 2, 4, 4]


def test_nothing_behind_a_gap_is_found(opened):
    store, names = opened(), names_of(4)
    save(store, [names[0], names[1], names[3]])
    assert found(store, names) == 2


def test_salts_share_nothing(opened):
    store = opened(blocks=9)
    save(store, names_of(3, salt="a"))
    assert found(store, names_of(3, salt="b")) == 0
    assert found(store, names_of(3)) == 0


def test_what_is_being_computed_is_waited_for_and_given_up_with_its_writer(opened):
    store, names = opened(), names_of(2)
    writer = store.insert(names)
    assert store.insert(names).wanted == (), "somebody is writing them"
    done = threading.Event()
    with store.load(names, on_done=done.set) as load:
        assert not done.wait(0.05)
        assert load.loaded == 0
        writer.close()
        assert done.wait(10)
        assert load.loaded == 0
    save(store, names)
    assert found(store, names) == 2


def test_a_block_is_found_as_soon_as_its_last_layer_is_there(opened):
    store, names = opened(), names_of(3)
    done = threading.Event()
    with store.insert(names) as writer, store.load(names, on_done=done.set) as load:
        for layer, (k, v) in enumerate(kv_of(names[0])):
            assert load.loaded == 0
            writer.fill(0, layer, k, v)
        assert load.loaded == 1
        assert holds(load.blob(0), names[0])
        assert found(store, names[:1]) == 1
        writer.close()
        assert done.wait(10)
        assert load.loaded == 1


def test_a_block_with_a_layer_missing_is_given_up(opened):
    store, names = opened(), names_of(2)
    with store.insert(names) as saving:
        for index in saving.wanted:
            for layer, (k, v) in enumerate(kv_of(names[index])):
                if (index, layer) != (1, 0):
                    saving.fill(index, layer, k, v)
    assert found(store, names) == 1


def test_a_fetch_that_was_stopped_before_its_blocks_were_located_keeps_what_it_has(opened):
    """The engine has counted on it: whatever the planner thinks later must not change it."""
    far, names = FarTier(), names_of(4)
    put(far, names)
    store = opened(far)
    save(store, names[:2])
    assert store.wait(10.0)
    for index in range(4):
        store.planner.computed(index, 0.0)  # nothing is worth loading
    with store._mutex:  # its threads wait
        fetch = store.load(names, unit=1)
        fetch.stop()
        assert fetch.loaded == 2
    assert store.wait(10.0)
    time.sleep(0.05)
    assert fetch.loaded == 2
    assert all(holds(fetch.blob(index), names[index]) for index in range(2))
    fetch.close()


def test_the_beginning_of_a_chain_stays_longest(opened):
    store, old, new = opened(blocks=4), names_of(4), names_of(2, seed=1)
    save(store, old)
    assert found(store, old) == 4
    save(store, new)
    assert found(store, old) == 2
    assert found(store, new) == 2


def test_no_room_is_no_error(opened):
    store = opened(blocks=2)
    save(store, names_of(5))
    assert store.stats()["host"].blocks == 2
    with store.load(names_of(5), unit=1) as fetch:
        assert fetch.loaded == 2
        save(store, names_of(3, seed=1))
        assert holds(fetch.blob(0), names_of(5)[0])
    empty = opened(blocks=0)
    save(empty, names_of(1))
    assert found(empty, names_of(1)) == 0


def test_a_block_that_left_the_host_comes_back_from_below(opened):
    far = FarTier()
    store, first, second = opened(far, blocks=3), names_of(3), names_of(3, seed=1)
    for chain in (first, second):
        save(store, chain)
        assert store.wait(10.0)
    assert found(store, first) == 3
    assert found(store, second) == 3
    stats = store.stats()
    assert stats["remote"].written == 6
    assert stats["remote"].loaded_bytes == 6 * FORMAT.nbytes
    assert stats["host"].evictions >= 6


def test_a_restart_finds_everything_on_the_disk(opened, tmp_path):
    names = names_of(5)
    first = store_of(DiskTier(tmp_path, 1 << 30))
    save(first, names)
    assert first.flush(10.0)
    first.close()
    assert found(opened(DiskTier(tmp_path, 1 << 30)), names) == 5


def test_many_who_want_one_block_wait_for_one_load(opened):
    far, names = FarTier(seconds=0.1), names_of(3)
    put(far, names)
    store = opened(far)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: found(store, names), range(8))) == [3] * 8
    assert sorted(far.reads) == sorted(name.hex for name in names)


def test_a_fetch_may_stop_early_and_keeps_what_it_has(opened):
    far, names = FarTier(seconds=0.05), names_of(8)
    put(far, names)
    store = opened(far)
    with store.load(names, unit=1) as fetch:
        wait_until(lambda: fetch.loaded >= 2)
        fetch.stop()
        count = fetch.loaded
        assert 2 <= count <= 8
        assert all(holds(fetch.blob(index), names[index]) for index in range(count))
        assert fetch.done
    assert store.wait(10.0)


def test_a_fetch_that_is_closed_while_it_loads_leaves_nothing_leased(opened):
    far, names = FarTier(seconds=0.05), names_of(6)
    put(far, names)
    store = opened(far)
    store.load(names, unit=2).close()
    fetch = store.load(names, unit=2)
    wait_until(lambda: fetch.loaded)
    fetch.close()
    fetch.close()


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_harmed_block_is_a_miss_and_is_removed(opened, place):
    far, names = FarTier(), names_of(3)
    put(far, names)
    harmed = blob_of(names[1])
    harmed[place] ^= 1
    far.write(names[1].hex, memoryview(harmed))
    store = opened(far)
    assert found(store, names) == 1
    assert store.stats()["remote"].errors == {"corrupt": 1}
    assert not far.contains(names[1].hex)


def test_a_block_under_anothers_key_is_a_miss(opened):
    far, names = FarTier(), names_of(2)
    far.write(names[0].hex, memoryview(blob_of(names[1])))
    far.write(names[1].hex, memoryview(blob_of(names[0])))
    store = opened(far)
    assert found(store, names[:1]) == found(store, names[1:]) == 0
    assert store.wait(10.0)
    assert store.stats()["remote"].errors == {"corrupt": 2}


def test_a_second_tier_helps_out(opened):
    near, far, names = FarTier("disk"), FarTier("remote"), names_of(3)
    put(far, names)
    harmed = blob_of(names[1])
    harmed[-1] ^= 1
    near.write(names[1].hex, memoryview(harmed))
    store = opened(near, far)
    assert found(store, names) == 3
    assert store.wait(10.0)
    assert near.contains(names[0].hex), "promoted"


@pytest.mark.parametrize("error", [TierError, RuntimeError])
def test_a_tier_that_fails_is_a_miss(opened, error):
    far, names = FarTier(), names_of(3)
    put(far, names)
    far.fails = error
    store = opened(far)
    assert found(store, names) == 0
    assert store.wait(10.0)
    far.fails = None
    assert found(store, names) == 3


def test_write_back_writes_what_leaves_and_flush_the_rest(opened):
    far = FarTier()
    store = opened(far, blocks=8, write_policy="write_back")
    save(store, names_of(4))
    assert store.wait(10.0)
    assert not list(far.scan())
    for seed in (1, 2, 3):  # more than half of host memory would have to be written before it could leave
        save(store, names_of(2, seed=seed))
        assert store.wait(10.0)
    assert len(list(far.scan())) >= 2
    assert store.stats()["host"].blocks == 8
    assert store.flush(10.0)
    assert len(list(far.scan())) == 10
    assert found(store, names_of(4)) == 4
    assert store.stats()["host"].errors == {}


def test_write_back_drops_and_counts_what_a_stuck_tier_would_make_it_wait_for(opened):
    far = FarTier()
    store = opened(far, blocks=4, write_policy="write_back")
    release = threading.Event()
    far.write, write = lambda *arguments: (release.wait(10), write(*arguments)), far.write
    began = time.monotonic()
    for seed in range(4):
        save(store, names_of(2, seed=seed))
    assert time.monotonic() - began < 1.0, "nothing waits for a tier"
    assert store.stats()["host"].errors["full"] >= 2
    release.set()
    assert store.flush(10.0)


def test_write_through_selective_writes_what_is_found_again(opened):
    far, names = FarTier(), names_of(3)
    store = opened(far, write_policy="write_through_selective", selective_hits=2)
    save(store, names)
    assert found(store, names[:2]) == 2
    assert store.wait(10.0)
    assert not list(far.scan())
    assert found(store, names[:1]) == 1
    assert store.wait(10.0)
    assert [stored.key for stored in far.scan()] == [names[0].hex]


def test_a_temporary_promotion_leaves_with_its_last_lease(opened):
    far, names = FarTier(), names_of(2)
    put(far, names)
    store = opened(far, promotion="temporary")
    assert found(store, names) == 2
    assert store.stats()["host"].blocks == 0
    assert found(store, names) == 2


def test_a_full_disk_costs_nothing_but_the_block(opened, tmp_path):
    store = opened(DiskTier(tmp_path, FORMAT.nbytes // 2, least_free=0))
    save(store, names_of(3))
    assert not store.flush(10.0)
    assert found(store, names_of(3)) == 3
    errors = store.stats()["disk"].errors
    assert errors["full"] >= 1
    assert errors["full"] + errors.get("parent", 0) >= 3, "without the first block the others are of no use"


def test_the_planner_leaves_a_slow_tier_after_the_first_chunk(opened):
    far, names = FarTier(seconds=0.1), names_of(8)
    put(far, names)
    store = opened(far)
    for index in range(4):
        store.planner.computed(index, 0.02)
    assert found(store, names, unit=2) == 2
    assert store.wait(10.0)
    assert sorted(far.reads) == sorted(name.hex for name in names[:2]), "no more is asked of a tier that is a stranger"
    fresh = opened(far)
    fresh.planner = store.planner
    assert found(fresh, names, unit=2) == 0


def test_a_fast_tier_brings_everything_from_the_first_time(opened):
    far, names = FarTier(), names_of(8)
    put(far, names)
    store = opened(far)
    for index in range(4):
        store.planner.computed(index, 10.0)
    assert found(store, names, unit=2) == 8
    assert sorted(far.reads) == sorted(name.hex for name in names)


def test_a_forgotten_fetch_loses_its_leases(opened, monkeypatch):
    store = opened(blocks=2)
    save(store, names_of(2))
    lost = store.load(names_of(2), unit=1)
    lost.deadline = time.monotonic() - 1
    save(store, names_of(2, seed=1))
    with pytest.raises(Exception, match="was held for more than"):
        lost.blob(0)
    assert found(store, names_of(2, seed=1)) == 2


def test_reads_never_see_a_slab_that_was_given_away(opened):
    """Threads save, fetch and compare on a host tier that is always full."""
    far = FarTier()
    store = opened(far, blocks=6)
    chains = [names_of(3, seed=seed) for seed in range(6)]

    def turn(number: int) -> int:
        rng = np.random.default_rng(number)
        for _ in range(10):
            chain = chains[rng.integers(len(chains))]
            save(store, chain) if rng.random() < 0.4 else found(store, chain)
        return number

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(turn, range(6))) == list(range(6))


class FailsAt(MemoryTier):
    """Fails at its n-th call, whichever that is, and works before and after."""

    name = "remote"

    def __init__(self, call: int, error: Exception) -> None:
        super().__init__()
        self.left, self.error = call, error

    def _check(self, key: str | None = None) -> None:
        super()._check(key)
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.parametrize("error", [TierError("full", "no space"), TierError("io", "EIO"), OSError("surprise")])
@pytest.mark.parametrize("call", range(1, 19))
def test_a_fault_at_any_call_costs_no_more_than_blocks(opened, call, error):
    far, names = FailsAt(call, error), names_of(3)
    store = opened(far)
    save(store, names)
    store.flush(10.0)
    for _ in range(2):
        with store._mutex:
            for buffer in store._host.ready():
                store._host._drop(buffer)
        assert found(store, names) <= 3  # each of which is looked at
        assert store.wait(10.0)
    save(store, names)
    assert store.wait(10.0)
    assert found(store, names) == 3
