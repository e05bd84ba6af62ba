"""Keys: the same on every machine, and never the same for what differs."""

import dataclasses
import os
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from tests.store.chains import NAMESPACE, names_of

# by struct.pack and hashlib alone, from the words at the top of kvjax/store/keys.py
GOLDEN_ROOT = "239ef70529fede482edc0c7fd3e5212e27c11e6c31654c01c4e11b0d28b4f6f4"
GOLDEN_KEYS = (
    "acb20d5baebdc5d9984677d0b7e551981d6c21969cd4e29b3998f9e6b6359178",
    "a5b392271a77bd8089dd17946fef8a69a30eda7b3d2b63f535d9f45b1d1f608f",
)

PROGRAM = """
import numpy as np
from kvjax.store.keys import BlockKey
from tests.store.chains import NAMESPACE
names = BlockKey.chain(NAMESPACE.root("tenant"), np.arange(600))
print(*(name.hex for name in names))
"""


def test_golden_vectors():
    """These never change: whoever changes them loses every cache that users have."""
    assert NAMESPACE.root().hex() == GOLDEN_ROOT
    names = BlockKey.chain(NAMESPACE.root(), np.arange(600))
    assert tuple(name.hex for name in names) == GOLDEN_KEYS


def test_processes_with_different_hash_seeds_agree():
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(printed) == 1
    assert len(printed.pop().split()) == 2


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(NAMESPACE)])
def test_every_field_of_a_namespace_counts(field):
    other = dataclasses.replace(NAMESPACE, **{field: getattr(NAMESPACE, field) + "x"})
    assert other.root() != NAMESPACE.root()
    assert other.root("a") != NAMESPACE.root("a")


def test_fields_do_not_run_into_each_other():
    one = dataclasses.replace(NAMESPACE, weights="ab", tokenizer="c")
    other = dataclasses.replace(NAMESPACE, weights="a", tokenizer="bc")
    assert one.root() != other.root()
    assert dataclasses.replace(NAMESPACE, adapter="x").root() != dataclasses.replace(NAMESPACE, profile="x").root()


def test_salts_share_nothing():
    everyone = {name.hex for salt in ("", "a", "b", "ab", "\udcff") for name in names_of(3, salt=salt)}
    assert len(everyone) == 15


@hypothesis.given(st.integers(0, 3 * BLOCK_TOKENS + 1), st.integers(0, 3 * BLOCK_TOKENS - 1))
def test_a_key_says_all_tokens_up_to_its_end(length, changed):
    tokens = np.arange(3 * BLOCK_TOKENS + 1)[:length]
    names = BlockKey.chain(NAMESPACE.root(), tokens)
    assert len(names) == length // BLOCK_TOKENS
    other = tokens.copy()
    other[changed:] += 1
    shared = [a.key == b.key for a, b in zip(names, BlockKey.chain(NAMESPACE.root(), other), strict=True)]
    assert shared == [(index + 1) * BLOCK_TOKENS <= changed for index in range(len(names))]


def test_the_type_of_the_tokens_does_not_count_and_what_does_not_fit_is_refused():
    assert BlockKey.chain(bytes(32), np.arange(BLOCK_TOKENS, dtype=np.int64)) == BlockKey.chain(
        bytes(32), np.arange(BLOCK_TOKENS, dtype=np.uint16)
    )
    with pytest.raises(ValueError, match="int32"):
        BlockKey.chain(bytes(32), np.full(BLOCK_TOKENS, 1 << 31, np.int64))
