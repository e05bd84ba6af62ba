"""Generation writer: KV of generated tokens on its way to the store, so that the next turn begins behind the answer.

    prefill    the prompt's tail, which fills no block, is cut out of the workspaces
    decode     tokens are gathered from the views before these forget them, and the executor takes them away
    a block    all of it there, and its tokens known: it is named, and may be found from then on

What is stored is what decode steps have computed, bit for bit. A view proves by its positions that it holds a token in
every head; the first one that is not proven ends what is stored of a turn, and so does an executor too far behind.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from kvjax.cache import View
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.prefill import Prefill
from kvjax.engine.device.runner import Runner
from kvjax.engine.kv.block_assembler import BlockAssembler, Gathered
from kvjax.engine.kv.prefix_cache import PrefixCache
from kvjax.store.keys import BLOCK_TOKENS, BlockKey


@dataclasses.dataclass
class GeneratedTokens:
    """The tokens that a request generates.

    Attributes:
        decoding: name under which their KV is stored and found: `CacheConfig.decoding` of the request.
        limit: most tokens.
        tokens: those that were drawn and read so far; it grows.
    """

    decoding: str
    limit: int
    tokens: list[int] = dataclasses.field(default_factory=list)


class GenerationWriters:
    """Writers by the slots that their turns decode in. The engine's thread owns it.

    Args:
        cache: where to; nothing is done without, or where its store does not keep generated tokens.
    """

    def __init__(self, cache: PrefixCache | None, caches: CacheConfig) -> None:
        self.cache = cache if cache is not None and cache.store.config.store_generated else None
        # tokens: no view forgets them sooner
        self._reach = min(BLOCK_TOKENS, *(plan.capacity for plan in caches.plans))
        self._reselect = caches.layout.reselect
        self._writers: dict[int, GenerationWriter] = {}

    def begin(
        self, parent: BlockKey, prompt: np.ndarray, length: int, generated: GeneratedTokens
    ) -> "GenerationWriter | None":
        """One for a turn; None where that fills no block, or is not to be stored.

        Args:
            parent: what the chain of generated tokens goes on from.
            prompt: token ids [T], of which the first `length` go through dense prefill.
        """
        cache = self.cache
        if cache is None:
            return None
        computed = len(prompt) + generated.limit - 1  # the last token has no KV
        if computed // BLOCK_TOKENS == length // BLOCK_TOKENS:
            return None
        return GenerationWriter(cache, BlockAssembler(cache, parent, prompt, length), length, generated.tokens)

    def tail(self, writer: "GenerationWriter", runner: Runner, prefill: Prefill, group: int) -> None:
        """The workspaces of this group hold the whole prompt; behind the last group, tokens follow in the slot."""
        writer.tail(runner, prefill, group)
        if not prefill.in_groups:
            self._writers[prefill.slot] = writer

    def before_steps(self, runner: Runner, alive: Bool[np.ndarray, "B"], ahead: int) -> None:
        """Before `ahead` more tokens enter the views of slots that are `alive`: gathers what these might forget."""
        lengths = runner.occupancy.length
        for slot, writer in self._writers.items():
            if lengths[slot] - writer.gathered + ahead > self._reach:
                self.gather(runner.views, slot, lengths[slot])
        if self._writers and self._reselect:
            for _, slot in runner.occupancy.full(alive):
                self.gather(runner.views, slot, lengths[slot])

    def gather(self, views: tuple[View, ...], slot: int, length: int | np.int64) -> None:
        """Takes all that a slot's views hold of its turn."""
        writer = self._writers.get(slot)
        while writer is not None and (behind := int(length) - writer.gathered) > 0:
            if not writer.gather(views, slot, min(behind, self._reach), self._reach):
                return

    def leave(self, views: tuple[View, ...], slot: int, length: int | np.int64) -> None:
        """The slot's request has ended, whichever way: what was generated is stored."""
        self.gather(views, slot, length)
        writer = self._writers.pop(slot, None)
        if writer is not None:
            writer.end()

    def warm_up(self, views: tuple[View, ...]) -> None:
        """Compiles what serving needs."""
        if self.cache is not None:
            jax.block_until_ready(_gather(self.cache, self._reach, views, slot=0, start=0))

    def check_integrity(self) -> None:
        """Raises AssertionError if a writer has not left its slot."""
        assert not self._writers, f"slots {sorted(self._writers)} are still being stored"


class GenerationWriter:
    """The tokens of one turn, on the engine's thread.

    Attributes:
        gathered: so many tokens of the sequence need not be taken from the views any more.
    """

    def __init__(self, cache: PrefixCache, chunks: BlockAssembler, length: int, generated: Sequence[int]) -> None:
        """`GenerationWriters.begin` makes it; `chunks` are the executor's from now on."""
        self.gathered = length
        self._executor, self._cache, self._chunks = cache.executor, cache, chunks
        self._generated, self._named = generated, 0  # how many of these the assembler knows

    def tail(self, runner: Runner, prefill: Prefill, group: int) -> None:
        """Takes what fills no block of the prompt that the workspaces of a group hold."""
        start = self._chunks.begin
        for place, layer in enumerate(runner.groups[group] if start < self.gathered else ()):
            cut = runner.slice_chunk(prefill, group, place, start, min(BLOCK_TOKENS, prefill.bucket))
            self._executor.put(functools.partial(self._chunks.tail, layer, cut))

    def gather(self, views: tuple[View, ...], slot: int, count: int, reach: int) -> bool:
        """Takes the next `count` tokens, `reach` at most, from the views of a slot; returns whether it could."""
        start, ids = self.gathered, list(self._generated[self._named :])

        def task() -> Callable[[], None]:
            gathered = _gather(self._cache, reach, views, slot, start)
            return lambda: self._chunks.add(start, gathered, ids)

        if self._chunks.ended or not self._executor.offer(task):
            return False
        self.gathered, self._named = start + count, self._named + len(ids)
        return True

    def end(self) -> None:
        """Nothing more is gathered; but by now more token ids may be known."""
        ids = list(self._generated[self._named :])
        if ids:
            self._executor.offer(lambda: lambda: self._chunks.add(self.gathered, (), ids))


def _gather(cache: PrefixCache, reach: int, views: tuple[View, ...], slot: int, start: int) -> Gathered:
    return steps.gather_tokens(reach, cache.store.layout.kv_heads, views, np.int32(slot), np.int32(start))
