"""KV of generated tokens on its way to the store, so that a conversation's next turn begins behind the answer.

    prefill    the prompt's tail, which fills no whole chunk, is cut out of the workspaces
    decode     tokens are gathered from the views before these forget them, and the saving thread takes them away
    a chunk    all of it there, and its tokens known: it is named, and may be found from then on

What is stored is what decode steps have computed, bit for bit. A view proves by its positions that it holds a token in
every head; the first one that is not proven ends what is stored of a turn, and so does a saving thread too far behind.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from kvjax.cache import View, Workspace
from kvjax.engine import steps
from kvjax.engine.caches import CacheConfig
from kvjax.engine.prefix import PrefixCache
from kvjax.store.block import DTYPES
from kvjax.store.keys import BLOCK_TOKENS, BlockKey

Gathered = Sequence[tuple[jax.Array, jax.Array, jax.Array]]  # of each layer K and V [N, K, D], and whether proven [N]


@dataclasses.dataclass
class GeneratedTokens:
    """What a request generates.

    Attributes:
        decoding: what its KV is stored under, and found by: `CacheConfig.decoding` of the request.
        limit: most tokens.
        tokens: those that were drawn and read so far; it grows.
    """

    decoding: str
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)


class GenerationWriters:
    """The turns whose generated tokens are stored, by the slots that they decode in. The engine's thread owns it.

    Args:
        cache: where to; nothing is done without, or where its store does not keep generated tokens.
    """

    def __init__(self, cache: PrefixCache | None, caches: CacheConfig) -> None:
        self.cache = cache if cache is not None and cache.store.config.store_generated else None
        self._reach = min(
            BLOCK_TOKENS, *(plan.capacity for plan in caches.plans)
        )  # tokens: no view forgets them sooner
        self._savers: dict[int, GenerationWriter] = {}

    def begin(
        self, parent: bytes, prompt: np.ndarray, length: int, answer: GeneratedTokens | None
    ) -> "GenerationWriter | None":
        """One for a turn; None where that fills no chunk, or is not to be stored.

        Args:
            parent: the key that the chain of generated tokens goes on from.
            prompt: token ids [T], of which the first `length` go through dense prefill.
        """
        cache = self.cache
        if cache is None or answer is None:
            return None
        if (
            len(prompt) + answer.limit - 1
        ) // cache.chunk_size == length // cache.chunk_size:  # the last token has no KV
            return None
        return GenerationWriter(cache, ChunkAssembler(cache, parent, prompt, length), length, answer.tokens)

    def tail(
        self, saver: "GenerationWriter | None", slot: int, layers: range, workspaces: Sequence[Workspace], size: int
    ) -> None:
        """The workspaces of these layers hold a whole prompt; behind the last layer, tokens follow in the slot.

        Args:
            size: tokens that are cut out at once: a chunk, or the whole workspace where that is shorter.
        """
        if saver is None or self.cache is None:
            return
        saver.tail(layers, workspaces, size)
        if layers.stop == self.cache.store.layout.layers:
            self._savers[slot] = saver

    def keep_up(self, views: tuple[View, ...], lengths: Int[np.ndarray, "B"], ahead: int) -> None:
        """Before `ahead` more tokens enter the views: takes what these might forget.

        Args:
            lengths: tokens of each slot's sequence whose KV has been computed, or more.
        """
        for slot, saver in self._savers.items():
            if lengths[slot] - saver.gathered + ahead > self._reach:
                self.gather(views, slot, lengths[slot])

    def gather(self, views: tuple[View, ...], slot: int, length: int | np.int64) -> None:
        """Takes all that a slot's views hold of its turn."""
        saver = self._savers.get(slot)
        while saver is not None and (behind := int(length) - saver.gathered) > 0:
            if not saver.gather(views, slot, min(behind, self._reach), self._reach):
                return

    def leave(self, views: tuple[View, ...], slot: int, length: int | np.int64) -> None:
        """Whoever held the slot has ended, whichever way: what was generated is stored."""
        self.gather(views, slot, length)
        saver = self._savers.pop(slot, None)
        if saver is not None:
            saver.end()

    def warm_up(self, views: tuple[View, ...]) -> None:
        """Compiles what serving needs."""
        if self.cache is not None:
            jax.block_until_ready(_gather(self.cache, self._reach, views, slot=0, start=0))

    def check_integrity(self) -> None:
        """Raises AssertionError if somebody has not left."""
        assert not self._savers, f"slots {sorted(self._savers)} are still being stored"


class GenerationWriter:
    """The tokens of one turn, as the engine's thread sees them.

    Attributes:
        gathered: so many tokens of the sequence need not be taken from the views any more.
    """

    def __init__(self, cache: PrefixCache, chunks: "ChunkAssembler", length: int, answer: Sequence[int]) -> None:
        """`GenerationWriters.begin` makes it; `chunks` are the saving thread's from now on."""
        self.gathered = length
        self._cache, self._chunks, self._answer, self._told = cache, chunks, answer, 0

    def tail(self, layers: range, workspaces: Sequence[Workspace], size: int) -> None:
        """The workspaces of these layers hold the whole prompt: takes what fills no chunk of it.

        Args:
            size: as for `GenerationWriters.tail`.
        """
        start = self._chunks.begin
        for place, layer in enumerate(layers if start < self.gathered else ()):
            cut = steps.slice_chunk(size, workspaces[place], np.int32(start))
            self._cache.put(functools.partial(self._chunks.tail, layer, cut))

    def gather(self, views: tuple[View, ...], slot: int, count: int, reach: int) -> bool:
        """Takes the next `count` tokens, `reach` at most, from the views of a slot; returns whether it could."""
        start, news = self.gathered, list(self._answer[self._told :])

        def begin() -> Callable[[], None]:
            gathered = _gather(self._cache, reach, views, slot, start)
            return lambda: self._chunks.add(start, gathered, news)

        if self._chunks.ended or not self._cache.offer(begin):
            return False
        self.gathered, self._told = start + count, self._told + len(news)
        return True

    def end(self) -> None:
        """Nothing more is gathered; but by now more tokens may be known."""
        news = list(self._answer[self._told :])
        if news:
            self._cache.offer(lambda: lambda: self._chunks.add(self.gathered, (), news))


class ChunkAssembler:
    """Puts together the chunks of one turn, from the prompt's tail on. The saving thread calls.

    Args:
        parent: the key before the first of them.
        prompt: token ids [T]; of the first `length` the whole chunks are stored elsewhere, and the others will come.

    Attributes:
        begin: position of the first token of the first chunk.
        ended: whether nothing more can be stored; for any thread.
    """

    def __init__(self, cache: PrefixCache, parent: bytes, prompt: np.ndarray, length: int) -> None:
        self.begin = length // cache.chunk_size * cache.chunk_size
        self.ended = False
        self._cache, self._parent = cache, parent
        self._base, self._front = self.begin, length  # of the first buffer; of the first token that is not in one
        self._tokens: list[int] = prompt[self.begin :].tolist()  # from `_base` on, as far as they are known
        self._buffers: list[np.ndarray] = []  # a chunk each [L, 2, K, P, D]
        self._harmed = False

    def tail(self, layer: int, cut: tuple[jax.Array, jax.Array]) -> None:
        """K and V [K, P, D] of one layer from `begin` on, of which the prompt's tokens count."""
        with self._unharmed():
            count = self._front - self._base
            for which, array in enumerate(cut):
                self._buffer(0)[layer, which, :, :count] = np.asarray(array)[:, :count]

    def add(self, start: int, gathered: Gathered, tokens: Sequence[int]) -> None:
        """Tokens from position `start` on in all layers, as far as they are proven; and the next token ids to be known.

        Nothing but the token ids where `gathered` is empty.
        """
        if self._harmed:
            return
        with self._unharmed():
            self._tokens += tokens
            if gathered and start == self._front:
                held = np.logical_and.reduce([np.asarray(held) for _, _, held in gathered])
                self._copy(gathered, len(held) if held.all() else int(held.argmin()))
            elif gathered:
                self.ended = True  # some were missing: what is here already is all
            self._store()

    def _copy(self, gathered: Gathered, count: int) -> None:
        arrays, done, chunk = [(np.asarray(k), np.asarray(v)) for k, v, _ in gathered], 0, self._cache.chunk_size
        while done < count:
            index, inside = divmod(self._front - self._base, chunk)
            more = min(count - done, chunk - inside)
            for layer, pair in enumerate(arrays):
                for which, array in enumerate(pair):
                    rows = array[done : done + more].swapaxes(0, 1)  # [N, K, D] to [K, N, D]
                    self._buffer(index)[layer, which, :, inside : inside + more] = rows
            done, self._front = done + more, self._front + more

    def _store(self) -> None:
        """Every chunk that is whole enters the store."""
        chunk = self._cache.chunk_size
        while len(self._tokens) >= chunk and self._front - self._base >= chunk:
            names = BlockKey.chain(self._parent, np.asarray(self._tokens[:chunk], np.int32))
            with self._cache.store.insert(names) as saving:
                for block in saving.wanted:
                    rows = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
                    for layer, (k, v) in enumerate(self._buffers[0]):
                        saving.fill(block, layer, k[:, rows], v[:, rows])
                saving.seal()
            self._parent, self._base = names[-1].key, self._base + chunk
            del self._tokens[:chunk], self._buffers[0]

    def _buffer(self, index: int) -> np.ndarray:
        format = self._cache.store.layout
        shape = (format.layers, 2, format.kv_heads, self._cache.chunk_size, format.head_dim)
        while len(self._buffers) <= index:
            self._buffers.append(np.empty(shape, DTYPES[format.dtype][1]))
        return self._buffers[index]

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """After a fault nothing more is stored: something is missing."""
        try:
            yield
        except BaseException:
            self.ended = self._harmed = True
            raise


def _gather(cache: PrefixCache, reach: int, views: tuple[View, ...], slot: int, start: int) -> Gathered:
    return steps.gather_tokens(reach, cache.store.layout.kv_heads, views, np.int32(slot), np.int32(start))
