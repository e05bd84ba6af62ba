"""Order of leaving on a real disk: what another store finds on the folder after a restart."""

from pathlib import Path

import numpy as np
import pytest

from kvjax.store.disk import DiskTier
from kvjax.store.eviction import POLICIES
from kvjax.store.keys import BlockKey
from tests.store.chains import FORMAT, store_of
from tests.store.evicting_tier import Ideal
from tests.store.test_order import conversation, found_after_restart, serve

SIZE = -(-FORMAT.nbytes // 4096) * 4096


def disk(folder: Path, blocks: int, policy: str = "lru") -> DiskTier:
    tier = DiskTier(folder, blocks * SIZE, policy=POLICIES[policy](), least_free=0)
    assert tier._parents.wait(20.0)
    return tier


def found_by_another(folder: Path, blocks: int, chains: list[list[BlockKey]], policy: str = "lru") -> list[int]:
    """Blocks of each chain that a store finds which has just opened the folder."""
    return found_after_restart(disk(folder, blocks, policy), chains)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_common_beginning_outlives_sixty_requests_and_a_restart(tmp_path, policy):
    """A disk of 40 blocks under host memory of 400, 60 requests with 4 blocks in common and 4 of their own."""
    store = store_of(disk(tmp_path, 40, policy), blocks=400, eviction_policy=policy)
    chains = [conversation(4, 4, seed) for seed in range(60)]
    for chain in chains:
        serve(store, chain)
    store.close()
    found = found_by_another(tmp_path, 40, chains, policy)
    assert min(found) >= 4, "the common beginning"
    assert sum(each - 4 for each in found) == 36, "no place is lost to blocks that cannot be reached"
    assert policy != "lru" or found[-9:] == [8] * 9, "the newest, as many as fit"


@pytest.mark.parametrize(("turns", "expected"), [([0, 1, 2, 3], [1, 5, 5, 5]), ([0, 1, 2, 3, 0], [5, 1, 5, 5])])
def test_conversations_without_a_common_beginning(tmp_path, turns, expected):
    """Four of five blocks on a disk of sixteen: the oldest has what is left of it, from its beginning on."""
    chains = [conversation(0, 5, seed) for seed in range(4)]
    store = store_of(disk(tmp_path, 16), blocks=40)
    for turn in turns:
        serve(store, chains[turn])
    store.close()
    assert found_by_another(tmp_path, 16, chains) == expected


def test_a_trace_of_five_hundred_turns_over_a_disk_of_a_fifth_of_their_size(tmp_path):
    """Every hundred turns the store is closed and opened again, so that order comes from the files too."""
    rng = np.random.default_rng(3)
    chains = [conversation(4, 12, seed) for seed in range(60)]
    lengths, active = [5] * len(chains), []
    size = (4 + 60 * 8) // 5
    ideal, hits, blocks = Ideal(size), 0, 0
    for start in range(0, 500, 100):
        store = store_of(disk(tmp_path, size), blocks=2 * size)
        for number in range(start, start + 100):
            if len(active) < 6:
                active.append(number % len(chains))
            which = active[rng.integers(len(active))]
            chain = chains[which][: lengths[which]]
            hits, blocks = hits + serve(store, chain), blocks + len(chain)
            ideal.request(chain)
            lengths[which] = min(lengths[which] + 1, 16)
            if rng.random() < 0.15 or lengths[which] == 16:
                active.remove(which)
        store.close()
    found, expected = found_by_another(tmp_path, size, chains), [ideal.extent(chain) for chain in chains]
    assert hits / blocks > 0.7
    assert sum(abs(a - b) > 1 for a, b in zip(found, expected, strict=True)) <= 1, (found, expected)
    assert abs(sum(found) - sum(expected)) <= 0.05 * sum(expected)
