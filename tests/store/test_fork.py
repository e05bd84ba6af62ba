"""Chains that leave dense prefill: keys that nobody else has, and fetches that go on with them where dense ones end."""

import hashlib
import struct
import threading

import numpy as np
import pytest

from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from tests.store.chains import NAMESPACE, blob_of, holds, names_of, save, store_of
from tests.store.memory_tier import MemoryTier

# by struct.pack and hashlib alone, from the words at the top of kvjax/store/keys.py
GOLDEN_FORK = "2806b74f3b02c5e5f1d9b79566d9cb2abe236310da7ca4e36de56c6361a431ca"
GOLDEN_KEYS = (
    "dec6fd1f38a6733e4bfcfefb7340ee5e3a6aff2f86aa041894ebb9a7ce2cc4a3",
    "57cebf03425b8fbd2d6de96ee3c12564e6a8102ecd24f230608fb37eea8daa9c",
)
TOKENS = np.arange(3 * BLOCK_TOKENS)
PROFILE = "p" * 64


def forked(dense: list[BlockKey], at: int, profile: str = PROFILE, blocks: int = 2) -> list[BlockKey]:
    """Generated blocks behind the first `at` dense ones."""
    tokens = np.random.default_rng(at).integers(0, 1000, blocks * BLOCK_TOKENS, np.int32)
    root, previous = (dense[at - 1].key,) * 2 if at else (NAMESPACE.root(), b"")
    return BlockKey.chain(NAMESPACE.fork(root, profile), tokens, previous)


def test_golden_vectors():
    """These never change: whoever changes them loses the answers of every cache that users have."""
    dense = BlockKey.chain(NAMESPACE.root(), TOKENS)
    fork = NAMESPACE.fork(dense[0].key, PROFILE)
    assert fork.hex() == GOLDEN_FORK
    names = BlockKey.chain(fork, TOKENS[BLOCK_TOKENS:])
    assert tuple(name.hex for name in names) == GOLDEN_KEYS


def test_the_words_at_the_top_of_the_module_are_what_is_done():
    fields = {
        "format": "kvjax-kv-2", "block": "256", "weights": "w" * 64, "tokenizer": "t" * 64, "rope": "theta=10000",
        "numerics": "jax 0.11 cpu chunk=512", "dtype": "float32", "shape": "2 x 2 x 4", "adapter": "",
        "profile": PROFILE, "salt": "",
    }  # fmt: skip
    parts = [part.encode() for pair in fields.items() for part in pair]
    root = hashlib.sha256(b"".join(struct.pack("<I", len(part)) + part for part in parts)).digest()
    parent = bytes.fromhex("acb20d5baebdc5d9984677d0b7e551981d6c21969cd4e29b3998f9e6b6359178")
    fork = hashlib.sha256(parent + root).digest()
    assert fork.hex() == GOLDEN_FORK
    keys = []
    for start in (256, 512):
        keys.append(
            hashlib.sha256((keys[-1] if keys else fork) + struct.pack("<256i", *range(start, start + 256))).digest()
        )
    assert tuple(key.hex() for key in keys) == GOLDEN_KEYS


def test_profiles_salts_and_dense_blocks_share_nothing():
    keys = set()
    for salt in ("", "a"):
        root = NAMESPACE.root(salt)
        dense = BlockKey.chain(root, TOKENS)
        keys |= {name.hex for name in dense}
        for profile in ("", "x", "y"):
            for at, key in enumerate([root, *(name.key for name in dense)]):
                keys |= {name.hex for name in BlockKey.chain(NAMESPACE.fork(key, profile), TOKENS[at * BLOCK_TOKENS :])}
    assert len(keys) == 2 * (3 + 3 * (3 + 2 + 1))


class Behind:
    """A store of which every block lies in the tier behind host memory, or in host memory itself."""

    def __init__(self, far: bool) -> None:
        self.far, self.tier = far, MemoryTier()
        self.tier.name = "remote"
        self.store = store_of(*([self.tier] if far else []), blocks=12)
        self.asked: list[int] = []

    def hold(self, names) -> None:
        for name in names if self.far else ():
            self.tier.write(name.hex, memoryview(blob_of(name)))
        if not self.far:
            save(self.store, names)

    def found(self, names, behind, unit: int = 1) -> tuple[int, int]:
        """How many blocks came, and how many of them could be dense ones; each is looked at."""

        def fork(end: int):
            self.asked.append(end)
            return behind(end)

        done = threading.Event()
        with self.store.load(names, unit=unit, on_done=done.set, chain=fork) as fetch:
            assert done.wait(10)
            for index in range(fetch.loaded):
                assert holds(fetch.blob(index), fetch.keys[index])
            assert len(fetch.keys) == len(names) // unit * unit
            assert len(fetch.found) == fetch.loaded
            return fetch.loaded, fetch.dense_prefix_length


@pytest.fixture(params=["host", "remote"])
def behind(request):
    behind = Behind(request.param == "remote")
    yield behind
    assert behind.store.wait(10.0)
    behind.store.check_integrity()
    behind.store.close()


def test_generated_blocks_are_found_behind_the_last_dense_one(behind):
    dense = names_of(4)
    behind.hold(dense[:2])
    behind.hold(forked(dense, 2))
    assert behind.found(dense, lambda end: forked(dense, end)) == (4, 2)
    assert behind.asked == [2]
    assert behind.found(dense, lambda end: forked(dense, end, "another profile")) == (2, 2)


def test_dense_blocks_come_first(behind):
    """Also where generated ones go on from an earlier place."""
    dense = names_of(4)
    behind.hold(dense[:3])
    behind.hold(forked(dense, 1, blocks=3))
    assert behind.found(dense, lambda end: forked(dense, end)) == (3, 3)
    behind.hold(dense[3:])
    assert behind.found(dense, lambda end: forked(dense, end)) == (4, 4)
    assert behind.asked == [3], "nobody asks where the chain is whole"


def test_a_prompt_of_nothing_but_generated_blocks(behind):
    dense = names_of(2)
    behind.hold(forked(dense, 0))
    assert behind.found(dense, lambda end: forked(dense, end)) == (2, 0)


def test_chains_part_at_whole_chunks(behind):
    """A dense block that fills no chunk is let go: it is not what the generated ones behind the chunk go on from."""
    dense = names_of(4)
    behind.hold(dense[:3])
    behind.hold(forked(dense, 2))
    assert behind.found(dense, lambda end: forked(dense, end), unit=2) == (4, 2)
    assert behind.asked == [2]


def test_a_gap_ends_the_second_chain_too(behind):
    dense = names_of(5)
    behind.hold(dense[:1])
    chain = forked(dense, 1, blocks=4)
    behind.hold([*chain[:1], *chain[2:]])
    assert behind.found(dense, lambda end: chain) == (2, 1)


def test_of_a_conversation_the_generated_end_leaves_before_the_dense_beginning():
    store, dense = store_of(blocks=6), names_of(4)
    generated = forked(dense, 2)
    save(store, [*dense[:2], *generated])
    with store.load(dense, unit=1, chain=lambda end: forked(dense, end)) as fetch:
        assert fetch.loaded == 4
    there = [*dense[:2], *generated]
    for seed, left in ((1, 4), (2, 4), (3, 3), (4, 2), (5, 1)):
        save(store, names_of(1, seed=seed))
        held = [name for name in there if store._host.find(name.hex)]
        assert held == there[:left]
    store.check_integrity()
    store.close()
