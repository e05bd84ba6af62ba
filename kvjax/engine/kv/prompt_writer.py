"""Prompt writer: new blocks of one prompt on their way from the device to the store.

engine's thread    put(block, count, layer, k, v)   arrays that the device may still be computing
executor           copies them to the host, block by block, into places of the store

Places are taken when the writer is made, so that other requests wait for a block instead of computing it too; and a
block may be found as soon as its last layer is copied, while the rest of the prompt is still being computed.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Num

from kvjax.engine.kv.executor import BackgroundExecutor
from kvjax.store.keys import BLOCK_TOKENS, BlockKey
from kvjax.store.prefix_load import PrefixLoad
from kvjax.store.store import KVStore


class PromptWriter:
    """Blocks of one prompt. The engine's thread calls, and the executor copies.

    Args:
        keys: of all blocks of the prompt, its tail included.
        length: tokens of the prompt; rows of the tail behind them are stored as zeros.
        check: stored blocks that are compared with the new ones, and closed at the end.
    """

    def __init__(
        self,
        store: KVStore,
        executor: BackgroundExecutor,
        keys: Sequence[BlockKey],
        length: int,
        check: PrefixLoad | None = None,
    ) -> None:
        self._store, self._executor, self._keys, self._length, self._check = store, executor, keys, length, check
        self._checked = 0 if check is None else min(check.loaded, check.dense_prefix_length)
        self._blocks = store.insert(keys, tail=length % BLOCK_TOKENS > 0)
        self._wanted = frozenset(self._blocks.wanted)
        self._closed = False

    def wants(self, block: int) -> bool:
        """Whether a block of the prompt is to be stored, or compared."""
        return block in self._wanted or block < self._checked

    def put(self, first: int, count: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        """K and V [K, count * BLOCK_TOKENS, D] of one layer of blocks from `first` on."""
        self._executor.put(lambda: self._fill(first, count, layer, k, v))

    def close(self) -> None:
        """Nothing more is put: blocks that are not whole are given up. May be called twice."""
        if not self._closed:
            self._closed = True
            self._executor.put(self._close)

    def _fill(self, first: int, count: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        keys, values = np.asarray(k), np.asarray(v)  # waits for the device
        for block in range(first, first + count):
            rows = slice((block - first) * BLOCK_TOKENS, (block - first + 1) * BLOCK_TOKENS)
            pair = self._cut(block, keys[:, rows]), self._cut(block, values[:, rows])
            if block in self._wanted:
                self._blocks.fill(block, layer, *pair)
            if self._check is not None and block < self._checked:
                stored = self._store.layout.tensors(self._check.blob(block), layer)
                same = all(a.tobytes() == b.tobytes() for a, b in zip(stored, pair, strict=True))
                self._store.checked(self._keys[block], same)

    def _cut(self, block: int, rows: Num[np.ndarray, "K C D"]) -> Num[np.ndarray, "K C D"]:
        """Rows behind the prompt's last token are whatever the workspace held."""
        inside = self._length - block * BLOCK_TOKENS
        if inside >= BLOCK_TOKENS:
            return rows
        cut = np.zeros_like(rows)
        cut[:, :inside] = rows[:, :inside]
        return cut

    def _close(self) -> None:
        self._blocks.close()
        if self._check is not None:
            self._check.close()
