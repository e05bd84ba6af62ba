"""Load queue: one computation for all, host memory in the order of turn, and tiers that do not slow one another."""

import threading
import time

import pytest

from kvjax.store.guard import Guarded
from kvjax.store.store import KVStore
from kvjax.store.tier import Tier, TierError
from tests.store.chains import FORMAT, blob_of, holds, kv_of, names_of, save, store_of
from tests.store.memory_tier import MemoryTier


class NamedTier(MemoryTier):
    """A dictionary of any name, whose calls can be held up."""

    def __init__(self, name: str, chains=()) -> None:
        super().__init__()
        self.name = name
        self.open = threading.Event()
        self.open.set()
        self.calls: list[str] = []
        for chain in chains:
            for key in chain:
                self.write(key.hex, memoryview(blob_of(key)))

    def read(self, key: str, into: memoryview) -> bool:
        self.calls.append("read")
        self.open.wait(30)
        return super().read(key, into)

    def contains_many(self, keys):
        self.calls.append("contains")
        self.open.wait(30)
        return super().contains_many(keys)


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


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def load_all(store: KVStore, keys, **settings):
    done = threading.Event()
    load = store.load(keys, on_done=done.set, **settings)
    return load, done


class TestOneComputation:
    def test_requests_that_wait_ride_on_what_one_of_them_computes(self, opened):
        store, keys = opened(), names_of(5)
        loads = [load_all(store, keys)[0] for _ in range(8)]
        wait_for(lambda: all(load.done for load in loads))
        assert [load.loaded for load in loads] == [0] * 8, "nothing is there yet"
        with store.insert(keys) as writer:  # the first request computes
            assert all(store.refresh(load) for load in loads[1:]), "its blocks are on their way"
            for index in writer.wanted:
                for layer, (k, v) in enumerate(kv_of(keys[index])):
                    writer.fill(index, layer, k, v)
                assert [load.loaded for load in loads[1:]] == [index + 1] * 7, "found as each block is done"
        assert all(load.done for load in loads[1:])
        assert all(holds(load.blob(4), keys[4]) for load in loads[1:])
        for load in loads:
            load.close()

    def test_a_computation_that_is_cancelled_leaves_what_it_had(self, opened):
        store, keys = opened(), names_of(5)
        with store.insert(keys) as writer, load_all(store, keys)[0] as waiting:
            for index in range(3):
                for layer, (k, v) in enumerate(kv_of(keys[index])):
                    writer.fill(index, layer, k, v)
            writer.close()
            assert waiting.done
            assert waiting.loaded == 3
        with load_all(store, keys)[0] as load:
            assert load.loaded == 3

    def test_a_load_that_was_stopped_is_not_extended(self, opened):
        store, keys = opened(), names_of(3)
        with load_all(store, keys)[0] as load:
            wait_for(lambda: load.done)
            load.stop()
            save(store, keys)
            assert not store.refresh(load)
            assert load.loaded == 0

    def test_a_load_extends_what_came_from_a_tier(self, opened):
        far, keys = NamedTier("remote", [names_of(2)]), names_of(4)
        store = opened(far)
        load, done = load_all(store, keys)
        with load:
            assert done.wait(10)
            assert load.loaded == 2
            save(store, keys)
            assert not store.refresh(load)
            assert load.loaded == 4
            assert load.found == ("remote", "remote", "host", "host")

    def test_generated_blocks_are_seen_by_a_second_look_too(self, opened):
        store, keys, generated = opened(), names_of(4), names_of(4, seed=7)
        load, done = load_all(store, keys, chain=lambda end: generated[end:])
        with load:
            assert done.wait(10)
            save(store, keys[:2])
            assert not store.refresh(load)
            assert load.loaded == 2
            save(store, generated[2:3])
            assert not store.refresh(load)
            assert (load.loaded, load.dense_prefix_length) == (3, 2)
            save(store, keys[2:])  # dense ones come first, also when they come late; but what is used stays
            assert not store.refresh(load)
            assert load.loaded >= 3


class TestHostMemoryByRequest:
    def test_eight_requests_of_all_of_it_each_are_served_in_their_turn(self, opened):
        chains = [names_of(8, seed=seed) for seed in range(8)]
        store = opened(NamedTier("disk", chains), blocks=8)
        loads = [load_all(store, chain)[0] for chain in chains]
        used = []
        for load, chain in zip(loads, chains, strict=True):
            wait_for(lambda load=load: load.done)
            load.stop()
            used.append(load.loaded)
            assert all(holds(load.blob(index), chain[index]) for index in range(load.loaded))
            load.close()
        assert used == [8] * 8

    def test_equal_requests_need_it_once(self, opened):
        chain = names_of(6)
        store = opened(NamedTier("disk", [chain]), blocks=8)
        loads = [load_all(store, chain)[0] for _ in range(8)]
        wait_for(lambda: all(load.done for load in loads))
        assert [load.loaded for load in loads] == [6] * 8
        for load in loads:
            load.close()

    def test_a_request_that_got_no_place_takes_what_is_there_and_is_counted(self, opened):
        chains = [names_of(6, seed=seed) for seed in range(2)]
        store = opened(NamedTier("disk", chains), blocks=8)
        first, _ = load_all(store, chains[0])
        wait_for(lambda: first.done)
        second, _ = load_all(store, chains[1])
        assert not second.done, "it waits for its turn"
        second.stop()
        assert second.loaded == 0
        second.close()
        assert store.stats()["host"].errors == {"no place": 1}
        first.close()

    def test_one_that_leaves_the_queue_makes_way(self, opened):
        chains = [names_of(6, seed=seed) for seed in range(3)]
        store = opened(NamedTier("disk", chains), blocks=8)
        first, second, third = (load_all(store, chain)[0] for chain in chains)
        wait_for(lambda: first.done)
        second.close()
        assert not third.done
        first.close()
        wait_for(lambda: third.done)
        assert third.loaded == 6
        third.close()


class TestTiersApart:
    def test_a_frozen_remote_slows_no_prompt_that_lies_on_the_disk(self, opened):
        chains = [names_of(4, seed=seed) for seed in range(16)]
        disk, remote = NamedTier("disk", chains[:8]), NamedTier("remote", chains[8:])
        store = opened(disk, remote, blocks=64)
        remote.open.clear()
        stuck = [load_all(store, chain)[0] for chain in chains[8:]]
        began = time.monotonic()
        for chain in chains[:8]:
            load, done = load_all(store, chain)
            with load:
                assert done.wait(5)
                assert load.loaded == 4
        assert time.monotonic() - began < 2.0
        remote.open.set()
        wait_for(lambda: all(load.done for load in stuck))
        for load in stuck:
            load.close()

    def test_what_the_disk_has_of_a_chain_is_loaded_while_the_remote_is_still_asked(self, opened):
        chain = names_of(6)
        disk, remote = NamedTier("disk", [chain[:4]]), NamedTier("remote", [chain])
        store = opened(disk, remote)
        remote.open.clear()
        load, done = load_all(store, chain)
        wait_for(lambda: load.loaded == 4)
        assert not load.done
        remote.open.set()
        assert done.wait(10)
        assert load.found == ("disk",) * 4 + ("remote",) * 2
        load.close()

    @pytest.mark.parametrize("names", [("peer",), ("disk", "disk"), ("a", "b", "remote")])
    def test_tiers_of_any_name_and_number(self, opened, names):
        tiers = [NamedTier(name, [names_of(2 * (number + 1))]) for number, name in enumerate(names)]
        store, keys = opened(*tiers), names_of(2 * len(tiers))
        load, done = load_all(store, keys)
        with load:
            assert done.wait(10)
            assert load.loaded == len(keys)
        assert store.wait(10.0)
        stats = store.stats()
        assert len(stats) == 1 + len(names)
        assert sum(tier.loaded_bytes for tier in stats.values()) == len(keys) * FORMAT.nbytes
        assert all(tier.contains(keys[0].hex) for tier in tiers)

    def test_look_ups_are_few(self, opened):
        chain = names_of(60)
        far = NamedTier("remote", [chain])
        store = opened(far, blocks=64)
        load, done = load_all(store, chain)
        with load:
            assert done.wait(10)
            assert load.loaded == 60
        assert far.calls.count("contains") <= 3
        other, done = load_all(store, names_of(60, seed=1))
        with other:
            assert done.wait(10)
        assert far.calls.count("contains") <= 4, "the first block is not there, so no other is asked for"


class TestProbes:
    def test_a_tier_that_was_passed_over_is_measured_without_anybody_waiting(self, opened):
        chain = names_of(4)
        far = NamedTier("remote", [chain])
        store = opened(far)
        for index in range(8):
            store.planner.computed(index, 0.01)
        store.planner.loaded("remote", 100.0)
        store.planner._tiers["remote"].measured -= 3.0  # long enough ago
        load, done = load_all(store, chain)
        with load:
            assert done.wait(10)
            assert load.loaded == 0
        assert store.wait(10.0)
        assert far.calls.count("read") == 1
        assert store.planner.load_seconds("remote") < 1.0
        load, done = load_all(store, chain)
        with load:
            assert done.wait(10)
            assert load.loaded == 4


class Stuck(MemoryTier):
    """Hangs in the calls that are named until it is let go, and then still uses the memory it was given."""

    name = "disk"

    def __init__(self, *calls: str) -> None:
        super().__init__()
        self.let_go = threading.Event()
        for call in calls:
            setattr(self, call, self._hanging(getattr(self, call)))

    def _hanging(self, call):
        def hang(*arguments):
            self.let_go.wait(60)
            return call(*arguments)

        return hang


CALLS = ("read", "write", "contains", "contains_many", "touch", "close")


class TestDeadlines:
    @pytest.mark.parametrize("call", CALLS)
    def test_nothing_waits_for_a_tier_that_hangs_and_closing_ends(self, call):
        tier, keys = Stuck(call), names_of(3)
        for key in keys:
            MemoryTier.write(tier, key.hex, memoryview(blob_of(key)))
        store = store_of(Guarded(tier, 0.3, copies=False, attempts=1), blocks=8)
        began = time.monotonic()
        save(store, names_of(2, seed=1))
        load, done = load_all(store, keys)
        assert time.monotonic() - began < 0.25, "neither inserting nor opening a load waits"
        assert done.wait(5), "a deadline ends what hangs"
        load.stop()
        load.close()
        began = time.monotonic()
        store.flush(0.5)
        store.close(1.0)
        assert time.monotonic() - began < 3.0
        tier.let_go.set()

    def test_memory_that_a_call_still_writes_to_is_lent_to_nobody(self):
        tier, keys = Stuck("read"), names_of(1)
        MemoryTier.write(tier, keys[0].hex, memoryview(blob_of(keys[0])))
        store = store_of(Guarded(tier, 0.1, copies=False, attempts=1), blocks=2)
        load, done = load_all(store, keys)
        assert done.wait(5)
        load.close()
        others = names_of(2, seed=3)
        save(store, others)
        assert store.stats()["host"].errors == {"full": 1}, "one of two buffers is still in use"
        tier.let_go.set()
        wait_for(lambda: all(event.is_set() for event, _ in store._writes._held))
        save(store, others[1:])
        with load_all(store, others)[0] as load:
            wait_for(lambda: load.done)
            assert load.loaded == 2
            assert all(holds(load.blob(index), others[index]) for index in range(2))
        assert store.wait(5.0)
        store.check_integrity()
        store.close()


class TestLog:
    def test_one_line_when_a_tier_starts_to_fail_and_one_when_it_is_well_again(self, opened, caplog):
        class Failing(MemoryTier):
            name = "disk"
            fails = True

            def contains(self, key: str) -> bool:
                if self.fails:
                    raise TierError("io", "the folder is gone")
                return super().contains(key)

        tier = Failing()
        store = opened(tier)
        with caplog.at_level("INFO"):
            for seed in range(4):
                save(store, names_of(1, seed=seed))
            assert store.wait(10.0)
            assert [record.message for record in caplog.records] == [
                "the disk tier fails (io): the folder is gone; requests go on without it"
            ]
            tier.fails = False
            save(store, names_of(1, seed=9))
            assert store.flush(10.0)
        assert len(caplog.records) == 2
        assert "the disk tier works again" in caplog.records[1].message
        assert " failed calls" in caplog.records[1].message
        assert store.stats()["disk"].errors["io"] >= 4
