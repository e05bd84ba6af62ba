"""The bytes of a block: one safetensors file that says what it is and proves that it is unharmed.

    8 bytes     length of the header
    header      JSON, padded with blanks to whole memory pages: `__metadata__` and the tensors
    tensors     layers.0.k, layers.0.v, layers.1.k ... each [K, 256, D]: any run of layers is one range of bytes

All blocks of one format are equally long and have their tensors at the same places, so nothing that a header says is
trusted: it must be, byte for byte, the header that belongs there, and the tensors must have its checksums.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence

import crc32c
import ml_dtypes
import numpy as np
from jaxtyping import Num, UInt8

from kvjax.store.keys import BLOCK_TOKENS, FORMAT, BlockKey

MOST_HEADER = 1 << 20
LEAST_TENSOR = 60  # bytes of a header that say where one tensor is
PAGE = 4096  # tensors begin at a memory page, so a mapped or a directly read file needs no copy to be aligned
DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16), "float16": ("F16", np.float16)}

Blob = UInt8[np.ndarray, " _"]


class CorruptBlockError(Exception):
    """The bytes are not the block that was asked for. Whoever meets it takes it for a miss and removes the object."""


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """What the blocks of one model look like. Sizes are in elements; `nbytes` is of a whole blob.

    Raises:
        ValueError: a size below 1, or a dtype that is not one of `DTYPES`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if min(self.layers, self.kv_heads, self.head_dim) < 1:
            raise ValueError(f"layers, kv_heads and head_dim must be positive, got {self}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one tensor."""
        return self.kv_heads, BLOCK_TOKENS, self.head_dim

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize

    @functools.cached_property
    def start(self) -> int:
        """Where the tensors begin."""
        nothing = BlockKey(bytes(32), bytes(32), bytes(32), bytes(32))
        return math.ceil((8 + len(self._json(nothing, [0] * 2 * self.layers))) / PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        return self.start + 2 * self.layers * self.tensor_bytes

    def tensors(self, blob: Blob, layer: int) -> tuple[Num[np.ndarray, "K C D"], Num[np.ndarray, "K C D"]]:
        """K and V of a layer, as views into the blob."""
        first, second = (self._tensor(blob, 2 * layer + which) for which in (0, 1))
        return (
            first.view(DTYPES[self.dtype][1]).reshape(self.shape),
            second.view(DTYPES[self.dtype][1]).reshape(self.shape),
        )

    def seal(self, blob: Blob, name: BlockKey) -> None:
        """Writes the header of a blob whose tensors are all there."""
        header = self._header(name, self._checksums(blob))
        blob[: self.start] = np.frombuffer(header, np.uint8)

    def check(self, blob: Blob, name: BlockKey) -> None:
        """Proves that a blob is the block of this name, unharmed.

        Raises:
            CorruptBlockError: it is not.
        """
        if blob.nbytes != self.nbytes:
            raise CorruptBlockError(f"{blob.nbytes} bytes instead of {self.nbytes}")
        # the checksums come from the tensors: a header that says others, or anything else of itself, differs
        if bytes(blob[: self.start]) != self._header(name, self._checksums(blob)):
            raise CorruptBlockError("header and tensors do not belong together")

    def _tensor(self, blob: Blob, index: int) -> Blob:
        begin = self.start + index * self.tensor_bytes
        return blob[begin : begin + self.tensor_bytes]

    def _checksums(self, blob: Blob) -> list[int]:
        return [crc32c.crc32c(memoryview(self._tensor(blob, index))) for index in range(2 * self.layers)]

    def _header(self, name: BlockKey, checksums: Sequence[int]) -> bytes:
        text = self._json(name, checksums).ljust(self.start - 8)
        return len(text).to_bytes(8, "little") + text

    def _json(self, name: BlockKey, checksums: Sequence[int]) -> bytes:
        # the last one is of the name: whoever lists a folder has nothing else to compare it with
        checksums = [*checksums, crc32c.crc32c(name.key + name.parent + name.tokens + name.previous)]
        header: dict[str, object] = {
            "__metadata__": {
                "format": FORMAT,
                "key": name.hex,
                "parent": name.parent.hex(),
                "tokens": name.tokens.hex(),
                "previous": name.previous.hex(),
                "crc32c": "".join(f"{checksum:08x}" for checksum in checksums),
            }
        }
        size = self.tensor_bytes
        for index in range(2 * self.layers):
            header[f"layers.{index // 2}.{'kv'[index % 2]}"] = {
                "dtype": DTYPES[self.dtype][0],
                "shape": list(self.shape),
                "data_offsets": [index * size, (index + 1) * size],
            }
        return json.dumps(header, separators=(",", ":")).encode()

    @classmethod
    def read_header(cls, blob: Blob) -> tuple["BlockLayout", BlockKey]:
        """Layout and key that a blob claims, of which nothing is proven yet.

        Args:
            blob: the first bytes of a block, as many as its header at least. Time and memory are linear in the header,
                which is 1 MiB at most, whatever it says.

        Raises:
            CorruptBlockError: no block begins so.
        """
        try:
            length = header_bytes(blob)
            if 8 + length > blob.nbytes:
                raise ValueError(f"a header of {length} bytes in {blob.nbytes}")
            header = _parse(bytes(blob[8 : 8 + length]))
            tensor, fields = _member(header, "layers.0.k", dict), _member(header, "__metadata__", dict)
            shape, layers = _member(tensor, "shape", list), (len(header) - 1) // 2
            if not (len(shape) == 3 and all(type(size) is int and size < 1 << 31 for size in shape)):
                raise ValueError("a shape that is not three sizes below 2^31")
            if shape[1] != BLOCK_TOKENS:
                raise ValueError(f"blocks of {shape[1]} tokens instead of {BLOCK_TOKENS}")
            if 2 * layers * LEAST_TENSOR > length:
                raise ValueError(f"{layers} layers in a header of {length} bytes")
            names = {short: name for name, (short, _) in DTYPES.items()}
            layout = cls(layers, shape[0], shape[2], names[_member(tensor, "dtype", str)])
            previous = _digest(fields, "previous") if fields.get("previous") else b""
            key = BlockKey(_digest(fields, "key"), _digest(fields, "parent"), _digest(fields, "tokens"), previous)
        except (ValueError, KeyError, RecursionError) as error:
            raise CorruptBlockError(f"no header of a block: {str(error)[:200] or type(error).__name__}") from error
        if layout.start != 8 + length:
            raise CorruptBlockError(f"a header of {length} bytes instead of {layout.start - 8}")
        return layout, key

    @classmethod
    def read(cls, blob: Blob) -> tuple["BlockLayout", BlockKey]:
        """What a blob says it is, once that is proven but for the tokens, of which only a digest is there.

        Raises:
            CorruptBlockError: it is no block, or not an unharmed one.
        """
        layout, key = cls.read_header(blob)
        layout.check(blob, key)
        return layout, key


def header_bytes(blob: Blob) -> int:
    """Length of the header that follows the first 8 bytes of a block.

    Raises:
        CorruptBlockError: no header has this length.
    """
    length = int.from_bytes(bytes(blob[:8]), "little")
    if blob.nbytes < 8 or not 0 < length <= MOST_HEADER:
        raise CorruptBlockError(f"no header of a block: its length would be {length} of at most {MOST_HEADER} bytes")
    return length


def _parse(text: bytes) -> dict[str, object]:
    """A JSON object of ASCII text that says nothing twice and has no number but whole ones."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("a name comes twice")
        return members

    def refuse(number: str) -> object:
        raise ValueError(f"the number {number:.20}")

    header = json.loads(text.decode("ascii"), object_pairs_hook=unique, parse_float=refuse, parse_constant=refuse)
    if not isinstance(header, dict):
        raise ValueError("not an object")
    return header


def _member[T](members: dict[str, object], name: str, kind: type[T]) -> T:
    """Raises ValueError where there is none of this type."""
    value = members.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"no {kind.__name__} {name!r}")
    return value


def _digest(members: dict[str, object], name: str) -> bytes:
    """Raises ValueError unless it is 32 bytes in hexadecimal digits."""
    text = _member(members, name, str)
    digest = bytes.fromhex(text)
    if digest.hex() != text or len(digest) != 32:
        raise ValueError(f"{name} is not 64 hexadecimal digits")
    return digest
