"""GGUF files that are damaged or made to do harm: one sentence, no traceback, no hang, no memory."""

import dataclasses
import functools
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax import models
from kvjax.models.gguf import GGUFFile, read_tokenizer
from tests.models import gguf_file, tiny

STRING, ARRAY, UINT8, UINT32, BOOL = 8, 9, 0, 4, 7
MUCH = 1 << 62


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape=(4,), kind=0, offset=0, dims=None) -> bytes:
    dims = len(shape) if dims is None else dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dims, *shape, kind, offset)


def file(fields=(), tensors=(), *, magic=b"GGUF", version=3, counts=None, data=b"\0" * 64) -> bytes:
    tensor_count, field_count = counts or (len(tensors), len(fields))
    header = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join(fields) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


NAMED = field(b"general.architecture", STRING, text(b"llama"))
REFUSED = {
    "a text": (b"Once upon a time there was no model", r"is not a GGUF file: it begins with b'Once', not b'GGUF'"),
    "nothing": (b"", r"is not a GGUF file: it begins with b''"),
    "the magic alone": (b"GGUF", "is cut off: 'version' takes 4 bytes and 0 are left"),
    "an old version": (file(version=1), "has GGUF version 1; these are implemented: 2, 3"),
    "another byte order": (file(version=3 << 24), "is a big-endian GGUF file"),
    "more fields than bytes": (file(counts=(0, MUCH)), r"says 4,611,\S+ fields of metadata; the \d+ bytes left cannot"),
    "more tensors than bytes": (file(counts=(MUCH, 0)), r"says 4,611,\S+ tensors; the \d+ bytes left cannot hold them"),
    "a field without its end": (file([NAMED])[:60], "is cut off: 'general.architecture' takes 8 bytes and 4 are left"),
    "a text beyond the file": (file([field(b"k", STRING, struct.pack("<Q", 9999))]), "'k' takes 9,999 bytes and"),
    "a text beyond all sense": (file([field(b"k", STRING, struct.pack("<Q", MUCH))]), "at most 16,777,216 are read"),
    "a name beyond all sense": (file([struct.pack("<Q", MUCH)], counts=(0, 1)), "at most 65,536 are read"),
    "a list beyond the file": (file([field(b"k", ARRAY, struct.pack("<IQ", UINT32, 1 << 20))]), "'k' takes 4,194,304"),
    "a list beyond all sense": (
        file([field(b"k", ARRAY, struct.pack("<IQ", UINT8, MUCH))]),
        "elements in 'k'; at most",
    ),
    "texts beyond the file": (file([field(b"k", ARRAY, struct.pack("<IQ", STRING, 1 << 20))]), "texts in 'k'; the"),
    "lists in lists": (file([field(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "has type 9 for 'k'"),
    "an unknown type": (file([field(b"k", 77, b"")]), "has type 77 for 'k'; that is no type of a number or text"),
    "a flag of 7": (file([field(b"k", BOOL, b"\7")]), "has 7 for 'k', where only 0 and 1 are possible"),
    "no UTF-8": (file([field(b"k", STRING, text(b"\xff\xfe"))]), "has bytes for 'k' that are not UTF-8"),
    "a field twice": (file([NAMED, NAMED]), "has the field 'general.architecture' twice"),
    "a tensor twice": (file(tensors=[tensor(b"t"), tensor(b"t", offset=32)]), "has the tensor 't' twice"),
    "overlapping tensors": (
        file(tensors=[tensor(b"a", (16,)), tensor(b"b", (4,), offset=32)]),
        "has tensors that overlap: 'a' and 'b'",
    ),
    "a tensor beyond the file": (
        file(tensors=[tensor(b"t", offset=1 << 40)]),
        r"is cut off: tensor 't' ends at byte 1,099,",
    ),
    "an offset that wraps": (
        file(tensors=[tensor(b"t", offset=(1 << 64) - 32)]),
        "is cut off: tensor 't' ends at byte",
    ),
    "a shape that wraps": (file(tensors=[tensor(b"t", (1 << 33, 1 << 33))]), "is cut off: tensor 't' ends at byte"),
    "an offset between": (file(tensors=[tensor(b"t", offset=4)]), "at offset 4, not a multiple of 32"),
    "an empty tensor": (file(tensors=[tensor(b"t", (4, 0))]), r"has an empty tensor 't', of shape \(0, 4\)"),
    "no dimensions": (file(tensors=[tensor(b"t", ())]), "has 0 dimensions for tensor 't'"),
    "many dimensions": (file(tensors=[tensor(b"t", dims=1 << 31)]), "has 2147483648 dimensions for tensor 't'"),
    "an unknown format": (file(tensors=[tensor(b"t", kind=99)]), "has tensor 't' of type 99, which is not known"),
    "half a block": (file(tensors=[tensor(b"t", (33,), kind=8)]), "not whole blocks of Q8_0"),
    "an odd alignment": (file([field(b"general.alignment", UINT32, struct.pack("<I", 48))]), "is no power of two"),
    "no alignment": (file([field(b"general.alignment", UINT32, struct.pack("<I", 0))]), "is no power of two"),
    "no architecture": (file(), "has no 'general.architecture' in its metadata"),
    "no tensors": (file([NAMED]), "has no tensor 'token_embd.weight': it is no language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused_with_one_sentence(name, tmp_path):
    content, match = REFUSED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=match) as error:
        models.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(error.value).startswith("model.gguf ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert peak < 4 << 20


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        models.read_config(tmp_path / "nowhere.gguf")


@functools.cache
def small() -> bytes:
    """A whole model in some 20 KB."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny.CONFIGS["llama"]
        config = dataclasses.replace(config, vocab_size=272, layers=config.layers[:1], width=8, mlp_width=8)
        models.save(tiny.fill(config), Path(folder) / "checkpoint")
        path = gguf_file.convert(Path(folder) / "checkpoint", Path(folder) / "small.gguf")
        return path.read_bytes()


def read(content: bytes) -> str | None:
    """Reads everything in a file; the refusal, or None if it is a model. Anything but ValueError is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.gguf"
        path.write_bytes(content)
        try:
            models.read_config(path)
            tokenizer = read_tokenizer(GGUFFile(path))
            tokenizer.decode(tokenizer.encode("Hello, 123 <|im_end|>"))
            models.load(path)
        except ValueError as error:
            refusal = str(error)
        else:
            return None
    assert len(refusal) < 4000
    return refusal


def test_the_small_file_is_a_model():
    assert read(small()) is None


@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(data):
    content = bytearray(small())
    # half of them in the header, where everything is said
    header = len(content) - 30_000 if len(content) > 40_000 else len(content) // 2
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    read(bytes(content))


@given(st.integers(min_value=0))
def test_a_truncated_file_is_refused(cut):
    content = small()
    assert read(content[: cut % len(content)]) is not None


@given(st.sampled_from([8, 16]), st.integers(0, (1 << 64) - 1))
def test_a_wrong_count_is_refused(at, count):
    content = bytearray(small())
    if count == struct.unpack_from("<Q", content, at)[0]:
        return
    struct.pack_into("<Q", content, at, count)
    assert read(bytes(content)) is not None


@given(st.data())
def test_wrong_numbers_anywhere_in_the_header_are_refused_or_harmless(data):
    """Lengths, kinds, shapes and offsets: whatever lies at a place becomes a number that is likely to do harm."""
    content = bytearray(small())
    at = data.draw(st.integers(4, 8000))
    extreme = [0, 1, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1]
    struct.pack_into("<Q", content, at, data.draw(st.sampled_from(extreme)))
    read(bytes(content))


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(small())
    opened = GGUFFile(path)
    path.write_bytes(small()[: opened.tensors["token_embd.weight"].offset + 8])
    with pytest.raises(ValueError, match=r"became shorter while tensor 'token_embd\.weight' was read"):
        opened.read("token_embd.weight")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    models.save(tiny.decoder("llama"), folder)
    path = gguf_file.convert(folder, tmp_path / "x.gguf", metadata={"llama.rope.freq_base": float("nan")})
    with pytest.raises(ValueError, match=r"has nan as 'llama\.rope\.freq_base'"):
        models.load(path)
    path = gguf_file.convert(
        folder, tmp_path / "y.gguf", edit=lambda tensors: tensors | {"rope_freqs.weight": np.zeros(4, np.float32)}
    )
    with pytest.raises(ValueError, match=r"a factor in 'rope_freqs\.weight' that is no number above zero"):
        models.load(path)
