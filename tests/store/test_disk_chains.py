"""Chains on a disk: their beginning stays, whoever wrote it, after restarts, and what is pinned stays altogether."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from kvjax.store.disk import DiskTier
from kvjax.store.disk_parents import ATTRIBUTE, HEAD, parent_in, parent_of, parents_first
from kvjax.store.eviction import POLICIES
from kvjax.store.keys import BlockKey
from kvjax.store.tier import TierError
from tests.store.chains import FORMAT, NAMESPACE, blob_of, names_of

SIZE = -(-FORMAT.nbytes // 4096) * 4096


@pytest.fixture
def open_disk(tmp_path):
    tiers = []

    def opened(blocks: int, policy: str = "lru") -> DiskTier:
        tiers.append(DiskTier(tmp_path, blocks * SIZE, policy=POLICIES[policy](), least_free=0))
        assert tiers[-1]._parents.wait(20.0)
        return tiers[-1]

    yield opened
    for tier in tiers:
        tier.check_integrity()
        tier.close()


def save(tier: DiskTier, names: list[BlockKey], *which: int) -> str:
    """Writes blocks, each with the one before as its parent; returns "." for each that is written, "x" for others."""
    outcome = ""
    for index in which or range(len(names)):
        try:
            tier.write(names[index].hex, memoryview(blob_of(names[index])), names[index - 1].hex if index else "")
            outcome += "."
        except TierError as error:
            outcome += "x" if error.reason == "full" else error.reason
    return outcome


def there(tier: DiskTier, names: list[BlockKey]) -> str:
    return "".join(".x"[not here] for here in tier.contains_many([name.hex for name in names]))


def path_of(tmp_path: Path, name: BlockKey) -> Path:
    return tmp_path / "kvjax-kv-2" / name.hex[:2] / name.hex


def age(tmp_path: Path, names: list[BlockKey]) -> None:
    """Gives files the order of last use."""
    for seconds, name in enumerate(reversed(names), start=100):
        os.utime(path_of(tmp_path, name), (time.time() - seconds,) * 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_chain_longer_than_the_disk_keeps_its_beginning(open_disk, policy):
    tier, names = open_disk(4, policy), names_of(8)
    assert save(tier, names) == "....xxxx"
    assert save(tier, names, 6, 7, 4) == "xxx"
    assert there(tier, names) == "....xxxx"
    assert tier.evictions == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_another_chain_takes_the_place_of_its_end(open_disk, policy):
    tier, old, new = open_disk(4, policy), names_of(4), names_of(3, seed=1)
    save(tier, old)
    for count, left in ((1, "...x"), (2, "..xx"), (3, ".xxx")):
        assert save(tier, new[:count]) == "." * count
        assert there(tier, old) == left
    assert save(tier, names_of(2, seed=1, salt="other")) == ".."
    assert there(tier, old) + there(tier, new) in ("xxxx..x", "xxxx.xx", ".xxx.xx", "xxxx..."[:7])


def test_a_chain_that_is_written_from_its_end_on_is_there_as_a_whole(open_disk):
    """As a host tier writes back what leaves it."""
    tier, names = open_disk(6), names_of(5)
    save(tier, names_of(6, seed=1))
    assert save(tier, names, 4, 3, 2, 1, 0) == "....."
    assert there(tier, names) == "....."


@pytest.mark.parametrize("policy", POLICIES)
def test_a_start_reads_the_parents_of_what_is_there(open_disk, tmp_path, policy):
    names, other = names_of(4), names_of(2, seed=1)
    save(open_disk(6), names)
    save(open_disk(6), other)
    age(tmp_path, [*names, *other])
    tier = open_disk(6, policy)
    for seed, left in ((2, "...x"), (3, "..xx"), (4, ".xxx")):
        save(tier, names_of(1, seed=seed))
        assert there(tier, names) == left
        assert there(tier, other) == ".."


def test_a_start_with_less_room_keeps_the_beginning(open_disk, tmp_path):
    names = names_of(6)
    save(open_disk(6), names)
    age(tmp_path, names)  # by time alone the beginning would leave
    assert there(open_disk(3), names) == "...xxx"


def test_blocks_of_another_process_have_their_parents(open_disk):
    one, other = open_disk(4), open_disk(4)
    names = names_of(3)
    save(other, names)
    save(one, names_of(1, seed=1))  # it sees them now
    assert one._parents.wait(20.0)
    save(one, names_of(2, seed=2))
    assert there(one, names) == ".xx"


def test_generated_blocks_keep_the_dense_ones_that_they_go_on_from(open_disk, tmp_path):
    """Their header names a fork; the file knows the block as well."""
    dense = names_of(2)
    generated = BlockKey.chain(NAMESPACE.fork(dense[-1].key, "p"), np.arange(512))
    tier = open_disk(4)
    save(tier, [*dense, *generated])
    if not hasattr(os, "getxattr") or parent_of(path_of(tmp_path, generated[0])) != dense[-1].hex:
        pytest.skip("this file system has no extended attributes")
    age(tmp_path, [*dense, *generated])
    tier = open_disk(4)
    save(tier, names_of(1, seed=1))
    assert there(tier, [*dense, *generated]) == "...x"
    save(tier, names_of(2, seed=2))
    assert there(tier, [*dense, *generated]) == "..xx" or there(tier, dense) == ".x"


def test_what_is_behind_a_removed_block_leaves_first(open_disk):
    tier, old, harmed = open_disk(6), names_of(2, seed=1), names_of(4)
    save(tier, old)
    save(tier, harmed)
    tier.delete(harmed[0].hex)
    save(tier, names_of(3, seed=2))
    assert there(tier, old) == ".."
    assert there(tier, harmed) == "x.xx"


def test_touch_counts_the_end_of_a_chain_as_the_first_to_leave_also_after_a_restart(open_disk, tmp_path):
    keys = [f"{number:064x}" for number in range(4)]  # no blocks: nothing but the times says anything
    tier = open_disk(4)
    for key in keys:
        tier.write(key, memoryview(bytes(SIZE)))
    chain = [keys[2], keys[0], "f" * 64, keys[3]]
    assert tier.touch(chain) == [True, True, False, True]
    assert list(tier._index.policy.order()) == [keys[1], keys[3], keys[0], keys[2]]
    assert list(open_disk(4)._index.policy.order()) == [keys[1], keys[3], keys[0], keys[2]]


def test_touch_waits_for_nobody(open_disk):
    """Whoever looks for a prompt is not held up by another process that makes room."""
    tier, other, names = open_disk(4), open_disk(4), names_of(4)
    save(tier, names)
    with other._alone():
        began = time.monotonic()
        assert tier.touch([name.hex for name in names]) == [True] * 4
        assert tier.contains_many([name.hex for name in names]) == [True] * 4
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_blocks_and_all_before_them_stay(open_disk, tmp_path, policy):
    tier, names = open_disk(5, policy), names_of(4)
    save(tier, names)
    assert tier.pin([names[1].hex, "e" * 64]) == [True, False]
    for seed in range(1, 9):
        save(tier, names_of(1, seed=seed))
    assert there(tier, names) == "..xx"
    assert tier.used_bytes == 5 * SIZE
    other = open_disk(5)
    for seed in range(9, 14):
        save(other, names_of(1, seed=seed))
    assert there(other, names)[:2] == ".."
    smaller = DiskTier(tmp_path, 2 * SIZE, least_free=0)
    assert smaller.used_bytes == 2 * SIZE
    assert there(smaller, names)[:2] == ".."
    smaller.close()
    tier.unpin([names[1].hex, "e" * 64])
    for seed in range(20, 26):
        save(tier, names_of(1, seed=seed))
    assert there(tier, names) == "xxxx"


def test_a_disk_full_of_pins_refuses(open_disk):
    tier, names = open_disk(2), names_of(2)
    save(tier, names)
    tier.pin([names[1].hex])
    assert save(tier, names_of(1, seed=1)) == "x"
    assert there(tier, names) == ".."
    tier.delete(names[1].hex)
    assert save(tier, names_of(1, seed=1)) == "."
    assert there(open_disk(2), names) == ".x", "a start forgets pins of what is gone"


def test_headers_that_make_a_circle_keep_nothing_for_ever(open_disk, tmp_path):
    """Only a forger can write them; the limit holds all the same."""
    keys = [f"{number:064x}" for number in range(1, 4)]
    save(open_disk(4), names_of(1))
    for key, parent in zip(keys, [keys[1], keys[2], keys[0]], strict=True):
        name = BlockKey(bytes.fromhex(key), bytes.fromhex(parent), bytes(32))
        path_of(tmp_path, name).write_bytes(bytes(blob_of(name)))
    tier = open_disk(4)
    assert save(tier, names_of(3, seed=1)) == "..."
    assert there(tier, names_of(3, seed=1)) == "..."


def test_the_parent_in_a_header_is_that_of_the_block():
    name = names_of(2)[1]
    head = bytes(blob_of(name)[:HEAD])
    assert parent_in(head, name.hex) == name.parent.hex()
    assert parent_in(head, name.parent.hex()) == "", "of another block"
    rng = random.Random(0)
    for _ in range(300):
        harmed = bytearray(head)
        harmed[rng.randrange(500)] = rng.randrange(256)
        found = parent_in(bytes(harmed), name.hex)
        assert found == "" or len(found) == 64
    for rubbish in (b"", head[:50], head[:200], bytes(9000), b"12345678{" * 900):
        assert parent_in(rubbish, name.hex) == ""
    assert ATTRIBUTE.startswith("user.")


def test_parents_come_before_their_children():
    keys = list(range(200))
    random.Random(1).shuffle(keys)
    ordered = parents_first({str(key): str(key - 1) for key in keys})
    assert ordered == [str(key) for key in range(200)]
    assert sorted(parents_first({"a": "b", "b": "a", "c": "c"})) == ["a", "b", "c"]
