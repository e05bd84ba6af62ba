"""New blocks on their way into the host tier: places that one writer fills, layer by layer, and then seals."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

from kvjax.store.host import HostBuffer
from kvjax.store.keys import BlockKey

if TYPE_CHECKING:
    from kvjax.store.store import KVStore


class BlockWriter:
    """A context manager: what was not sealed by its end is given up.

    Attributes:
        wanted: which of the blocks, by index, have a place; the others are there already, or there is no room.
    """

    def __init__(self, store: KVStore, names: Sequence[BlockKey], buffers: Sequence[HostBuffer | None]) -> None:
        """`KVStore.save` makes it."""
        self._store, self._names = store, names
        self._buffers = {index: buffer for index, buffer in enumerate(buffers) if buffer is not None}
        self.wanted = tuple(self._buffers)
        self._filled: collections.Counter[int] = collections.Counter()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fill(self, index: int, layer: int, k: Num[np.ndarray, "K C D"], v: Num[np.ndarray, "K C D"]) -> None:
        """Copies one layer of one block into its place."""
        keys, values = self._store.format.tensors(self._buffers[index].blob, layer)
        keys[...], values[...] = k, v
        self._filled[index] += 1

    def seal(self) -> None:
        """Blocks of which every layer was filled may be found from now on; the others are given up."""
        while self._buffers:
            index, buffer = self._buffers.popitem()
            if self._filled[index] == self._store.format.layers:
                self._store.format.seal(buffer.blob, self._names[index])
                self._store.saved(buffer)
            self._store.release(buffer)

    def close(self) -> None:
        """Gives up what is not sealed. May be called twice."""
        while self._buffers:
            self._store.release(self._buffers.popitem()[1])
