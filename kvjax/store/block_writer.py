"""Block writer: new blocks on their way into host memory, filled layer by layer and found as soon as they are whole."""

import collections
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Num

from kvjax.store.block import BlockLayout
from kvjax.store.host import HostBuffer, HostTier
from kvjax.store.keys import BlockKey
from kvjax.store.load_queue import LoadQueue
from kvjax.store.write_queue import WriteQueue


class BlockWriter:
    """Places in host memory for blocks that are being computed. A context manager: what is not whole is given up.

    One thread at a time may fill and close it. A block may be found by others from the moment at which its last layer
    is filled, and waited for from the beginning.

    Attributes:
        wanted: indices of the blocks that have a place; the others are there already, or nothing may leave for them.
    """

    def __init__(
        self,
        layout: BlockLayout,
        keys: Sequence[BlockKey],
        host: HostTier,
        loads: LoadQueue,
        writes: WriteQueue,
        mutex: threading.RLock,
        tail: bool = False,
    ) -> None:
        """`KVStore.insert` makes it, under the mutex."""
        self._layout, self._keys = layout, keys
        self._host, self._loads, self._writes, self._mutex = host, loads, writes, mutex
        self._buffers: dict[int, HostBuffer] = {}
        for index, key in enumerate(keys):
            buffer = host.take(key.hex, key.previous.hex())
            if buffer is not None:
                buffer.tail = tail and index == len(keys) - 1
                self._buffers[index] = buffer
        self.wanted = tuple(self._buffers)
        self._filled: collections.Counter[int] = collections.Counter()

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fill(self, index: int, layer: int, k: Num[np.ndarray, "K C D"], v: Num[np.ndarray, "K C D"]) -> None:
        """Copies one layer of one block into its place; the last layer makes it whole."""
        buffer = self._buffers[index]
        keys, values = self._layout.tensors(buffer.blob, layer)
        keys[...], values[...] = k, v
        self._filled[index] += 1
        if self._filled[index] == self._layout.layers:
            self._layout.seal(buffer.blob, self._keys[index])
            with self._mutex:
                self._loads.arrived(self._buffers.pop(index))
                self._writes.sealed(buffer)
                self._host.release(buffer)

    def close(self) -> None:
        """Gives up what is not whole. May be called twice."""
        with self._mutex:
            while self._buffers:
                buffer = self._buffers.popitem()[1]
                key = buffer.key
                self._host.release(buffer)
                self._loads.lost(key)
