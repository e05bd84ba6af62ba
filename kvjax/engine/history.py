"""Full KV of earlier prompts in host memory, so that the next turn of a conversation computes only what is new.

A piece's key is the hash of all tokens up to its end and of the caller's salt: a prompt finds the longest chain of
pieces that begins as it does, whoever asked before. Least recently used pieces leave first.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

LayerKV = tuple[np.ndarray, np.ndarray]  # K and V [K, piece, D]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Full K and V of one piece of a prompt, in every layer."""

    layers: tuple[LayerKV, ...]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)


class History:
    """Owned by the engine's thread.

    Args:
        piece: tokens of a piece.
        most_bytes: of all pieces together.
    """

    def __init__(self, piece: int, most_bytes: int) -> None:
        self._piece = piece
        self._most_bytes = most_bytes
        self._pieces: collections.OrderedDict[bytes, Piece] = collections.OrderedDict()
        self.nbytes = 0

    def keys(self, tokens: np.ndarray, salt: str) -> Iterator[bytes]:
        """Of each whole piece of a prompt."""
        digest = hashlib.blake2b(salt.encode(), digest_size=32)
        for end in range(self._piece, len(tokens) + 1, self._piece):
            digest.update(tokens[end - self._piece : end].astype("<i4").tobytes())
            yield digest.digest()

    def find(self, keys: Iterable[bytes]) -> list[Piece]:
        """The longest chain of pieces that a prompt with these `keys` begins with."""
        found = []
        for key in keys:
            if key not in self._pieces:
                break
            self._pieces.move_to_end(key)
            found.append(self._pieces[key])
        return found

    def put(self, key: bytes, piece: Piece) -> None:
        """Keeps a piece, and lets go of the oldest ones where there is no room; one larger than all is not kept."""
        if key in self._pieces or piece.nbytes > self._most_bytes:
            return
        self._pieces[key] = piece
        self.nbytes += piece.nbytes
        while self.nbytes > self._most_bytes:
            _, oldest = self._pieces.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def check_integrity(self) -> None:
        """Raises AssertionError if it holds more than it may, or other than it says."""
        assert self.nbytes == sum(piece.nbytes for piece in self._pieces.values()) <= self._most_bytes
