"""The bytes of a block: readable by others, and any harm is seen."""

import json
import time
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors

from kvjax.store.block import MOST_HEADER, PAGE, BlockLayout, CorruptBlockError
from kvjax.store.keys import BlockKey
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


def blob_with_header(text: bytes, nbytes: int | None = None) -> np.ndarray:
    blob = len(text).to_bytes(8, "little") + text
    return np.frombuffer(blob.ljust(nbytes or len(blob), b"\0"), np.uint8)


def header_with(**changes: object) -> bytes:
    """The header of a small block, with other values in the first tensor (`shape`, `dtype`) or the metadata."""
    header = json.loads(bytes(blob_of(names_of(1)[0])[8 : FORMAT.start]))
    for name, value in changes.items():
        header["__metadata__" if name in header["__metadata__"] else "layers.0.k"][name] = value
    return json.dumps(header).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * (MOST_HEADER - 8),
        b'{"a":' * 200_000,
        b'{"__metadata__":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"layers.0.k":{"shape":[' + b"9" * 5000 + b",256,4]}}",
        header_with(shape=[10**17, 256, 10**17]),
        header_with(shape=[float("nan"), 256, 4]),
        header_with(shape=[float("inf"), 256, 4]),
        header_with(shape=[1e300, 256, 4]),
        header_with(shape=[-2, 256, 4]),
        header_with(shape=[0, 256, 4]),
        header_with(shape=[True, 256, 4]),
        header_with(shape=["2", 256, "4"]),
        header_with(shape=[2, 257, 4]),
        header_with(shape=[2, 256]),
        header_with(shape=None),
        header_with(dtype=["F32"]),
        header_with(dtype={"F32": 1}),
        header_with(dtype="F64"),
        header_with(key=""),
        header_with(key="00" * 31),
        header_with(key=" ".join(["00"] * 32)),
        header_with(key=7),
        header_with(parent="\u0660" * 64),
        header_with(tokens="x" * 64),
        b'{"layers.0.k":{},"layers.0.k":{}}',
        b"null",
        b"[]",
        b"NaN",
        "{}".encode("utf-16"),
        b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b"}",
    ],
    ids=lambda text: f"{len(text)} bytes, {text[:20].decode(errors='replace')}",
)
def test_a_header_of_any_content_is_refused_in_bounded_time_and_memory(text):
    blob = blob_with_header(text, max(len(text) + 8, FORMAT.nbytes))
    tracemalloc.start()
    began = time.process_time()
    try:
        for read in (BlockLayout.read, BlockLayout.read_header):
            with pytest.raises(CorruptBlockError):
                read(blob)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.process_time() - began < 5.0
    with pytest.raises(CorruptBlockError):
        FORMAT.check(blob, names_of(1)[0])


def test_a_key_of_another_length_is_no_key_though_its_checksum_is_right():
    for short in (b"", b"k" * 31):
        blob = blob_of(names_of(1)[0])
        FORMAT.seal(blob, BlockKey(short, bytes(32), bytes(32)))
        with pytest.raises(CorruptBlockError, match="64 hexadecimal digits"):
            BlockLayout.read(blob)


def test_the_header_alone_says_the_layout():
    name = names_of(1)[0]
    blob = blob_of(name)
    assert BlockLayout.read_header(blob[: FORMAT.start]) == (FORMAT, name)
    for length in (0, 7, 8, 100, FORMAT.start - 1):
        with pytest.raises(CorruptBlockError):
            BlockLayout.read_header(blob[:length])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)


@hypothesis.given(st.sampled_from(["key", "parent", "tokens", "crc32c", "format", "shape", "dtype"]), JSON)
def test_a_header_with_any_value_in_any_place_is_refused(field, value):
    header = header_with(**{field: value})
    blob = blob_of(names_of(1)[0])
    hypothesis.assume(json.loads(header) != json.loads(bytes(blob[8 : FORMAT.start])))
    blob[: FORMAT.start] = np.frombuffer(
        (FORMAT.start - 8).to_bytes(8, "little") + header.ljust(FORMAT.start - 8)[: FORMAT.start - 8], np.uint8
    )
    with pytest.raises(CorruptBlockError):
        BlockLayout.read(blob)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="positive"):
        BlockLayout(0, 1, 1, "float32")
    with pytest.raises(ValueError, match="one of float32"):
        BlockLayout(1, 1, 1, "int8")
