"""Prompt writer: new chunks of one prompt on their way from the device to the store.

engine's thread    put(chunk, layer, k, v)   arrays that the device may still be computing
executor           copies them to the host, block by block, into places of the store
the last           seal: the new blocks may be found from now on
"""

import jax
import numpy as np

from kvjax.engine.kv.executor import BackgroundExecutor
from kvjax.store.block_writer import BlockWriter
from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from kvjax.store.prefix_load import PrefixLoad
from kvjax.store.store import KVStore


class PromptWriter:
    """Chunks of one prompt. The engine's thread calls, and the executor copies.

    Args:
        names: of the new blocks, `chunk_blocks` a chunk.
        check: stored blocks that are compared with the new ones, and closed at the end.

    Attributes:
        parent: the key that generated tokens behind them go on from.
        chunks: how many there are.
    """

    def __init__(
        self,
        store: KVStore,
        executor: BackgroundExecutor,
        names: list[BlockKey],
        chunk_blocks: int,
        parent: bytes,
        check: PrefixLoad | None = None,
    ) -> None:
        self.parent, self.chunks = parent, len(names) // chunk_blocks
        self._store, self._executor = store, executor
        self._names, self._chunk_blocks, self._check = names, chunk_blocks, check
        self._blocks: BlockWriter | None = None
        executor.put(self._open)

    def put(self, chunk: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        """K and V [K, chunk, D] of one layer of a new chunk, counted from the first new one."""
        self._executor.put(lambda: self._fill(chunk, layer, k, v))

    def seal(self) -> None:
        """All layers of all chunks were put."""
        self._executor.put(self._seal)

    def abandon(self) -> None:
        """The prompt will not be finished; no effect after `seal`."""
        self._executor.put(self._close)

    def _open(self) -> None:
        self._blocks = self._store.insert(self._names)

    def _fill(self, chunk: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        if self._blocks is None:  # it could not be opened, or has been abandoned
            return
        keys, values = np.asarray(k), np.asarray(v)  # waits for the device
        for part in range(self._chunk_blocks):
            index, rows = chunk * self._chunk_blocks + part, slice(part * BLOCK_TOKENS, (part + 1) * BLOCK_TOKENS)
            if index in self._blocks.wanted:
                self._blocks.fill(index, layer, keys[:, rows], values[:, rows])
            if self._check is not None and index < min(self._check.loaded, self._check.dense_prefix_length):
                stored = self._store.layout.tensors(self._check.blob(index), layer)
                pairs = zip(stored, (keys[:, rows], values[:, rows]), strict=True)
                self._store.checked(self._names[index], all(a.tobytes() == b.tobytes() for a, b in pairs))

    def _seal(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._blocks is not None:
            self._blocks.close()
            self._blocks = None
        if self._check is not None:
            self._check.close()
            self._check = None
