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
    def read(cls, blob: Blob) -> tuple["BlockLayout", BlockKey]:
        """What a blob says it is, once that is proven but for the tokens, of which only a digest is there.

        Raises:
            CorruptBlockError: it is no block, or not an unharmed one.
        """
        length = int.from_bytes(bytes(blob[:8]), "little")
        try:
            if length > MOST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(bytes(blob[8 : 8 + length]))
            kv_heads, _, head_dim = header["layers.0.k"]["shape"]
            dtype = {short: name for name, (short, _) in DTYPES.items()}[header["layers.0.k"]["dtype"]]
            said = cls((len(header) - 1) // 2, int(kv_heads), int(head_dim), dtype)
            fields = header["__metadata__"]
            name = BlockKey(*(bytes.fromhex(fields[field]) for field in ("key", "parent", "tokens", "previous")))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CorruptBlockError(f"no header of a block: {error!r}") from error
        said.check(blob, name)
        return said, name
