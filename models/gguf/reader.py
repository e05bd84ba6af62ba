"""GGUF reader: the header of a file, checked whole, and its tensors one at a time.

The file comes from anywhere, so every length, count and offset in it is compared with the bytes that are there
before anything is read or allocated by it. What does not fit is a ValueError of one sentence. Layout:

    magic, version, number of tensors, number of fields | fields | tensors: name, shape, type, offset | padding | data

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUFFIX = ".gguf"
# block formats that are dequantised, by the names of ggml
QUANTISATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_ALIGNMENT = "general.alignment"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# bounds far above any published file: a header that passes them is damaged or hostile
_MAX_KEY, _MAX_STRING, _MAX_ARRAY, _MAX_DIMS = 1 << 16, 1 << 24, 1 << 26, 4
_MIN_FIELD, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_SLAB = 1 << 24  # numbers dequantised at once

Value = str | int | float | bool | list[str] | np.ndarray


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. `shape` is outermost first, as NumPy has it; `offset` and `size` are in bytes."""

    name: str
    shape: tuple[int, ...]
    quantisation: str
    offset: int
    size: int


class GGUFFile:
    """The metadata and the tensors of one GGUF file.

    Attributes:
        metadata: the fields by name; arrays of numbers are NumPy arrays, arrays of strings are lists.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header, and no weight.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a GGUF file, damaged, cut off, or of a kind that is not implemented; says which.
        """
        self.path = Path(path)
        with self.path.open("rb") as file:
            header = _Header(file, self.path.name, os.fstat(file.fileno()).st_size)
            tensors, fields = header.start()
            self.metadata: Mapping[str, Value] = header.fields(fields)
            self.tensors: Mapping[str, StoredTensor] = header.tensors(tensors, _alignment(self))
        if (parts := self.integer("split.count", 1)) > 1:
            raise self.fault(f"is one of {parts} parts; join them first, with `llama-gguf-split --merge`")

    def fault(self, sentence: str) -> ValueError:
        """The error for a file that cannot be served, which names it."""
        return ValueError(f"{self.path.name} {sentence}")

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor, dequantised. Raises ValueError for a format that is not in `QUANTISATIONS`."""
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        if tensor.quantisation not in QUANTISATIONS:
            raise self.fault(_not_implemented(tensor))
        raw_type = GGMLQuantizationType[tensor.quantisation]
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.size // rows
        out = np.empty((rows, columns), np.float32)
        buffer = max(1, _SLAB // columns)
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, rows, buffer):
                stop = min(start + buffer, rows)
                raw = file.read((stop - start) * row_bytes)
                if len(raw) < (stop - start) * row_bytes:
                    raise self.fault(f"became shorter while tensor {name!r} was read")
                blocks = np.frombuffer(raw, np.uint8).reshape(stop - start, row_bytes)
                out[start:stop] = dequantize(blocks, raw_type)
        return out.reshape(tensor.shape)

    def check_quantisations(self) -> None:
        """Raises ValueError if a tensor has a format that is not implemented."""
        for tensor in self.tensors.values():
            if tensor.quantisation not in QUANTISATIONS:
                raise self.fault(_not_implemented(tensor))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata. Raises ValueError if it is not there, or of another type."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(f"has {_shown(value)} as {key!r}; only one whole number is implemented")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number of the metadata. Raises ValueError if it is not there, or of another type."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(f"has {_shown(value)} as {key!r}; only a number is implemented")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata. Raises ValueError if it is not there, or of another type."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.fault(f"has {_shown(value)} as {key!r}; only a text is implemented")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of the metadata. Raises ValueError for another type."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fault(f"has {_shown(value)} as {key!r}; only true and false are implemented")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings of the metadata. Raises ValueError if it is not there, or of another type."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self.fault(f"has {_shown(value)} as {key!r}; only a list of texts is implemented")
        return value

    def numbers(self, key: str) -> np.ndarray:
        """An array of numbers of the metadata. Raises ValueError if it is not there, or of another type."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            raise self.fault(f"has {_shown(value)} as {key!r}; only a list of numbers is implemented")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.fault(f"has no {key!r} in its metadata")
        return value


class _Header:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file, self._name, self._size = file, name, size
        self._position = 0

    def start(self) -> tuple[int, int]:
        """Checks magic and version; the numbers of tensors and of fields."""
        magic = self._file.read(len(MAGIC))
        self._position = len(magic)
        if magic != MAGIC:
            raise ValueError(f"{self._name} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        (version,) = self._unpack("<I", "version")
        if version not in VERSIONS:
            if not version & 0xFFFF:
                raise ValueError(f"{self._name} is a big-endian GGUF file; only little-endian ones are implemented")
            raise ValueError(f"{self._name} has GGUF version {version}; these are implemented: 2, 3")
        tensors, fields = self._unpack("<QQ", "counts")
        self._fits(fields, _MIN_FIELD, "fields of metadata")
        self._fits(tensors, _MIN_TENSOR, "tensors")
        return tensors, fields

    def fields(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self._string("the name of a field", _MAX_KEY)
            if key in metadata:
                raise ValueError(f"{self._name} has the field {key!r} twice")
            (kind,) = self._unpack("<I", key)
            metadata[key] = self._field(kind, key)
        return metadata

    def tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        tensors: dict[str, StoredTensor] = {}
        for _ in range(count):
            tensor = self._tensor(alignment)
            if tensor.name in tensors:
                raise ValueError(f"{self._name} has the tensor {tensor.name!r} twice")
            tensors[tensor.name] = tensor
        start = -(-self._position // alignment) * alignment
        placed = {name: dataclasses.replace(each, offset=start + each.offset) for name, each in tensors.items()}
        end, before = start, ""
        for tensor in sorted(placed.values(), key=lambda each: each.offset):
            if tensor.offset < end:
                raise ValueError(f"{self._name} has tensors that overlap: {before!r} and {tensor.name!r}")
            end, before = tensor.offset + tensor.size, tensor.name
            if end > self._size:
                raise ValueError(
                    f"{self._name} is cut off: tensor {tensor.name!r} ends at byte {end:,}, the file at "
                    f"{self._size:,}; fetch it again"
                )
        return placed

    def _tensor(self, alignment: int) -> StoredTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._string("the name of a tensor", _MAX_KEY)
        (dims,) = self._unpack("<I", name)
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"{self._name} has {dims} dimensions for tensor {name!r}; 1 to {_MAX_DIMS} are possible")
        shape = self._unpack(f"<{dims}Q", name)
        if not all(shape):
            raise ValueError(f"{self._name} has an empty tensor {name!r}, of shape {shape[::-1]}")
        kind, offset = self._unpack("<IQ", name)
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise ValueError(
                f"{self._name} has tensor {name!r} of type {kind}, which is not known; these are implemented: "
                f"{', '.join(QUANTISATIONS)}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            raise ValueError(
                f"{self._name} has rows of {shape[0]} numbers in tensor {name!r}, not whole blocks of {kind.name} "
                f"({block})"
            )
        if offset % alignment:
            raise ValueError(f"{self._name} has tensor {name!r} at offset {offset}, not a multiple of {alignment}")
        return StoredTensor(name, shape[::-1], kind.name, offset, math.prod(shape) // block * block_bytes)

    def _field(self, kind: int, key: str) -> Value:
        if kind == _STRING:
            return self._string(key, _MAX_STRING)
        if kind == _ARRAY:
            kind, count = self._unpack("<IQ", key)
            return self._array(kind, count, key)
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, kind: int, count: int, key: str) -> Value:
        if count > _MAX_ARRAY:
            raise ValueError(f"{self._name} has {count:,} elements in {key!r}; at most {_MAX_ARRAY:,} are read")
        if kind == _STRING:
            self._fits(count, 8, f"texts in {key!r}")
            return [self._string(key, _MAX_STRING) for _ in range(count)]
        return self._numbers(kind, count, key)

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"{self._name} has type {kind} for {key!r}; that is no type of a number or text")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self._read(count * dtype.itemsize, key), np.uint8 if kind == _BOOL else dtype)
        if kind == _BOOL:
            if (values > 1).any():
                raise ValueError(f"{self._name} has {int(values.max())} for {key!r}, where only 0 and 1 are possible")
            values = values.astype(bool)
        return values

    def _string(self, what: str, bound: int) -> str:
        (length,) = self._unpack("<Q", what)
        if length > bound:
            raise ValueError(f"{self._name} has {length:,} bytes for {what!r}; at most {bound:,} are read")
        raw = self._read(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._name} has bytes for {what!r} that are not UTF-8") from None

    def _unpack(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._read(struct.calcsize(layout), what))

    def _read(self, count: int, what: str) -> bytes:
        left = self._size - self._position
        raw = self._file.read(count) if count <= left else b""
        if len(raw) < count:
            raise ValueError(
                f"{self._name} is cut off: {what!r} takes {count:,} bytes and {left:,} are left; fetch it again"
            )
        self._position += count
        return raw

    def _fits(self, count: int, least: int, what: str) -> None:
        left = self._size - self._position
        if count * least > left:
            raise ValueError(
                f"{self._name} says {count:,} {what}; the {left:,} bytes left cannot hold them: it is cut off or "
                f"damaged"
            )


def _alignment(file: GGUFFile) -> int:
    alignment = file.integer(_ALIGNMENT, 32)
    if alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise file.fault(f"has {alignment} as {_ALIGNMENT!r}, which is no power of two up to {1 << 20}")
    return alignment


def _not_implemented(tensor: StoredTensor) -> str:
    known = ", ".join(QUANTISATIONS)
    return f"has tensor {tensor.name!r} in {tensor.quantisation}; these are implemented: {known}"


def _shown(value: Any) -> str:
    """A value in an error: short, whatever the file holds."""
    if isinstance(value, list | np.ndarray):
        return f"a list of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
