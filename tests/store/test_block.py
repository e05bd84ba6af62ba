"""The bytes of a block: readable by others, and any harm is seen."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors

from kvjax.store.block import PAGE, BlockLayout, CorruptBlockError
from tests.store.chains import FORMAT, blob_of, kv_of, names_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layers", [1, 2, 33])
def test_a_block_is_a_safetensors_file(dtype, layers):
    format, name = BlockLayout(layers, 2, 4, dtype), names_of(1)[0]
    blob = blob_of(name, format)
    assert blob.nbytes == format.nbytes
    assert format.start % PAGE == 0
    read = dict(safetensors.deserialize(blob.tobytes()))
    assert len(read) == 2 * layers
    for layer, pair in enumerate(kv_of(name, format)):
        for letter, tensor in zip("kv", pair, strict=True):
            said = read[f"layers.{layer}.{letter}"]
            assert said["dtype"] == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
            assert tuple(said["shape"]) == tensor.shape
            assert said["data"] == tensor.tobytes()


def test_what_it_says_of_itself():
    name = names_of(2)[1]
    assert BlockLayout.read(blob_of(name)) == (FORMAT, name)


def test_an_unharmed_block_is_proven_and_another_ones_is_not():
    first, second = names_of(2)
    blob = blob_of(first)
    FORMAT.check(blob, first)
    with pytest.raises(CorruptBlockError):
        FORMAT.check(blob, second)
    with pytest.raises(CorruptBlockError):
        BlockLayout(2, 2, 8, "float32").check(blob, first)
    with pytest.raises(CorruptBlockError):
        BlockLayout(1, 4, 4, "float32").check(blob, first)


SMALL = BlockLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")


def test_a_byte_counts_wherever_it_is():
    """Each third one; `test_harm.py` tries all of them."""
    name = names_of(1)[0]
    blob = blob_of(name, SMALL)
    for place in (*range(0, SMALL.nbytes, 3), SMALL.nbytes - 1):
        blob[place] ^= 1 << place % 8
        with pytest.raises(CorruptBlockError):
            SMALL.check(blob, name)
        with pytest.raises(CorruptBlockError):
            BlockLayout.read(blob)
        blob[place] ^= 1 << place % 8
    SMALL.check(blob, name)


def test_a_block_of_any_other_length_is_none():
    name = names_of(1)[0]
    longer = np.concatenate([blob_of(name, SMALL), np.zeros(PAGE, np.uint8)])
    for length in (*range(0, SMALL.nbytes, 5), SMALL.nbytes - 1, SMALL.nbytes + 1, longer.nbytes):
        with pytest.raises(CorruptBlockError):
            SMALL.check(longer[:length], name)
        with pytest.raises(CorruptBlockError):
            BlockLayout.read(longer[:length])


@hypothesis.given(st.binary(max_size=300))
def test_hostile_headers_are_refused(header):
    for claimed in (len(header), 1 << 62, 0):
        blob = np.frombuffer(claimed.to_bytes(8, "little") + header, np.uint8)
        with pytest.raises(CorruptBlockError):
            BlockLayout.read(blob)


def test_a_header_that_asks_for_huge_tensors_allocates_nothing():
    name = names_of(1)[0]
    text = bytes(blob_of(name)[8 : FORMAT.start]).replace(b"[2,256,4]", b"[2000000000,256,4]")
    blob = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    with pytest.raises(CorruptBlockError):
        BlockLayout.read(blob)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive"):
        BlockLayout(0, 1, 1, "float32")
    with pytest.raises(ValueError, match="one of float32"):
        BlockLayout(1, 1, 1, "int8")
