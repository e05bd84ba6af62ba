"""Order of leaving: what a restart finds is what an ideal leaf-first order of the same size would have kept."""

import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kvjax.store.eviction import POLICIES
from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from kvjax.store.store import KVStore
from tests.store.chains import NAMESPACE, kv_of, store_of
from tests.store.evicting_tier import EvictingTier, Ideal


def conversation(system: int, own: int, seed: int) -> list[BlockKey]:
    """A prompt of `system` blocks that all have in common, and `own` of its own."""
    common = np.random.default_rng(99).integers(0, 1000, system * BLOCK_TOKENS, np.int32)
    rest = np.random.default_rng(seed).integers(0, 1000, own * BLOCK_TOKENS, np.int32)
    return BlockKey.chain(NAMESPACE.root(), np.concatenate([common, rest]))


def serve(store: KVStore, chain: list[BlockKey]) -> int:
    """One request: loads what there is, computes the rest, and leaves; returns how many blocks were found."""
    done = threading.Event()
    with store.load(chain, on_done=done.set) as load:
        assert done.wait(10)
        load.stop()
        found = load.loaded
        with store.insert(chain[found:]) as writer:
            for index in writer.wanted:
                for layer, (k, v) in enumerate(kv_of(chain[found + index])):
                    writer.fill(index, layer, k, v)
    assert store.wait(10.0)  # requests one after another: the ideal knows no other order
    return found


def found_after_restart(tier: EvictingTier, chains: list[list[BlockKey]]) -> list[int]:
    store = store_of(tier, blocks=max(map(len, chains)))
    found = []
    for chain in chains:
        done = threading.Event()
        with store.load(chain, on_done=done.set) as load:
            assert done.wait(10)
            found.append(load.loaded)
    assert store.wait(10.0)
    store.close()
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_common_beginning_outlives_sixty_requests(policy):
    """A disk of 40 blocks under host memory of 400: hits in host memory count for the disk too."""
    tier = EvictingTier(40, POLICIES[policy]())
    store = store_of(tier, blocks=400, eviction_policy=policy)
    chains = [conversation(4, 4, seed) for seed in range(60)]
    for chain in chains:
        serve(store, chain)
    assert store.wait(10.0)
    store.close()
    assert all(tier.contains(key.hex) for key in chains[0][:4]), "the common beginning"
    found = found_after_restart(tier, chains)
    assert min(found) >= 4
    if policy in ("lru", "fifo"):
        assert found[-9:] == [8] * 9, "the newest, as many as fit"
    assert sum(each - 4 for each in found) == 36, "no place is lost to blocks that cannot be reached"


def test_what_the_disk_has_evicted_is_written_again_when_it_is_used():
    tier = EvictingTier(6)
    store = store_of(tier, blocks=40)
    first = conversation(0, 4, seed=0)
    serve(store, first)
    for seed in range(1, 4):
        serve(store, conversation(0, 4, seed))
    assert not tier.contains(first[0].hex)
    assert serve(store, first) == 4, "host memory has it"
    assert store.wait(10.0)
    store.close()
    assert found_after_restart(tier, [first]) == [4]


@settings(max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=25),
    size=st.integers(3, 16),
    host=st.sampled_from([12, 40]),
)
def test_any_sequence_of_requests_agrees_with_the_ideal_to_a_block_a_conversation(requests, size, host):
    tier, ideal = EvictingTier(size), Ideal(size)
    store = store_of(tier, blocks=host)
    chains = [conversation(2, 4, seed) for seed in range(6)]
    for number, length in requests:
        serve(store, chains[number][:length])
        ideal.request(chains[number][:length])
    assert store.wait(10.0)
    store.check_integrity()
    store.close()
    expected = [ideal.extent(chain) for chain in chains]
    found = found_after_restart(tier, chains)
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), (found, expected)


def test_a_trace_of_five_hundred_turns_over_a_tier_of_a_fifth_of_their_size():
    """Conversations that grow by a block a turn behind a common beginning, some of them for much longer than others."""
    rng = np.random.default_rng(3)
    chains = [conversation(4, 12, seed) for seed in range(60)]
    turns = [5] * len(chains)
    total = 4 + 60 * 8
    tier, ideal = EvictingTier(total // 5), Ideal(total // 5)
    store = store_of(tier, blocks=2 * total // 5)
    active: list[int] = []
    hits = blocks = 0
    for number in range(500):
        if len(active) < 6:
            active.append(number % len(chains))
        which = active[rng.integers(len(active))]
        chain = chains[which][: turns[which]]
        hits, blocks = hits + serve(store, chain), blocks + len(chain)
        ideal.request(chain)
        turns[which] = min(turns[which] + 1, 16)
        if rng.random() < 0.15 or turns[which] == 16:
            active.remove(which)
    assert store.wait(10.0)
    store.close()
    found, expected = found_after_restart(tier, chains), [ideal.extent(chain) for chain in chains]
    assert hits / blocks > 0.7
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), (found, expected)
    assert abs(sum(found) - sum(expected)) <= 0.05 * sum(expected)
