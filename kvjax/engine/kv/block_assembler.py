"""Block assembler: puts the generated blocks of one turn together on the host and gives them to the store."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from kvjax.engine.kv.prefix_cache import PrefixCache
from kvjax.store.block import DTYPES
from kvjax.store.keys import BLOCK_TOKENS, BlockKey

Gathered = Sequence[tuple[jax.Array, jax.Array, jax.Array]]  # of each layer K and V [N, K, D], and whether proven [N]


class BlockAssembler:
    """Blocks of one turn, from the prompt's tail on. The executor calls.

    Args:
        parent: what the first of them goes on from: its key, and the key of the block before.
        prompt: token ids [T]; of the first `length` the whole blocks are stored elsewhere, and the others will come.

    Attributes:
        begin: position of the first token of the first block.
        ended: whether nothing more can be stored; for any thread.
    """

    def __init__(self, cache: PrefixCache, parent: BlockKey, prompt: np.ndarray, length: int) -> None:
        self.begin = length // BLOCK_TOKENS * BLOCK_TOKENS
        self.ended = False
        self._cache, self._parent = cache, parent
        self._base, self._front = self.begin, length  # of the first buffer; of the first token that is not in one
        self._tokens: list[int] = prompt[self.begin :].tolist()  # from `_base` on, as far as they are known
        self._buffers: list[np.ndarray] = []  # a block each [L, 2, K, P, D]
        self._failed = False

    def tail(self, layer: int, cut: tuple[jax.Array, jax.Array]) -> None:
        """K and V [K, P, D] of one layer from `begin` on, of which the prompt's tokens count."""
        with self._or_fail():
            count = self._front - self._base
            for index, array in enumerate(cut):
                self._buffer(0)[layer, index, :, :count] = np.asarray(array)[:, :count]

    def add(self, start: int, gathered: Gathered, tokens: Sequence[int]) -> None:
        """Tokens from position `start` on in all layers, as far as they are proven; and the next token ids to be known.

        Nothing but the token ids where `gathered` is empty.
        """
        if self._failed:
            return
        with self._or_fail():
            self._tokens += tokens
            if gathered and start == self._front:
                proven = np.logical_and.reduce([np.asarray(held) for _, _, held in gathered])
                self._copy(gathered, len(proven) if proven.all() else int(proven.argmin()))
            elif gathered:
                self.ended = True  # some were missing: what is here already is all
            self._store()

    def _copy(self, gathered: Gathered, count: int) -> None:
        arrays, done, chunk = [(np.asarray(k), np.asarray(v)) for k, v, _ in gathered], 0, BLOCK_TOKENS
        while done < count:
            buffer, inside = divmod(self._front - self._base, chunk)
            more = min(count - done, chunk - inside)
            for layer, pair in enumerate(arrays):
                for index, array in enumerate(pair):
                    rows = array[done : done + more].swapaxes(0, 1)  # [N, K, D] to [K, N, D]
                    self._buffer(buffer)[layer, index, :, inside : inside + more] = rows
            done, self._front = done + more, self._front + more

    def _store(self) -> None:
        """Every block that is whole enters the store."""
        while len(self._tokens) >= BLOCK_TOKENS and self._front - self._base >= BLOCK_TOKENS:
            [key] = BlockKey.chain(self._parent.key, np.asarray(self._tokens[:BLOCK_TOKENS]), self._parent.previous)
            with self._cache.store.insert([key]) as writer:
                for layer, (k, v) in enumerate(self._buffers[0] if writer.wanted else ()):
                    writer.fill(0, layer, k, v)
            self._parent, self._base = dataclasses.replace(key, previous=key.key), self._base + BLOCK_TOKENS
            del self._tokens[:BLOCK_TOKENS], self._buffers[0]

    def _buffer(self, index: int) -> np.ndarray:
        layout = self._cache.store.layout
        shape = (layout.layers, 2, layout.kv_heads, BLOCK_TOKENS, layout.head_dim)
        while len(self._buffers) <= index:
            self._buffers.append(np.empty(shape, DTYPES[layout.dtype][1]))
        return self._buffers[index]

    @contextlib.contextmanager
    def _or_fail(self) -> Iterator[None]:
        """After a fault nothing more is stored: something is missing."""
        try:
            yield
        except BaseException:
            self.ended = self._failed = True
            raise
