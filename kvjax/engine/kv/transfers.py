"""KV transfers: all KV that moves between the runner's arrays and the store, in the order of a request's life.

    lookup         a request comes: its stored prefix is brought to host memory
    begin          its prefill begins: `PromptTransfer` loads workspaces before units, and slices new chunks after them
    before_steps   decode steps follow: generated tokens are gathered that these would make the views forget
    leave          the slot is free: what is left of the generated tokens is gathered

The loop calls it around the runner, which knows nothing of it. Without a store every call does nothing.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool

from kvjax.engine.device.prefill import Prefill
from kvjax.engine.device.runner import EXTENSION, Runner
from kvjax.engine.kv.generation_writer import GeneratedTokens, GenerationWriter, GenerationWriters
from kvjax.engine.kv.prefix_cache import PrefixCache, StoredPrefix
from kvjax.engine.kv.prompt_writer import PromptWriter
from kvjax.store.keys import BLOCK_TOKENS


class KVTransfers:
    """Those of one runner. The engine's thread owns it; only `lookup` and `release` are for any thread.

    Args:
        cache: None computes every prompt from its first token on.
    """

    def __init__(self, runner: Runner, cache: PrefixCache | None) -> None:
        self._runner, self._cache = runner, cache
        self._generated = GenerationWriters(cache, runner.caches)

    def lookup(
        self, prompt: np.ndarray, compress_after: int | None, salt: str, decoding: str, on_done: Callable[[], None]
    ) -> StoredPrefix | None:
        """Starts to bring the stored KV of a prompt to host memory; None where nothing could be used.

        Args:
            compress_after: as for `Runner.begin`; the others as for `PrefixCache.lookup`.
        """
        caches = self._runner.caches
        tokens = prompt[: caches.selected(len(prompt), compress_after)]
        if self._cache is None or not caches.layout.stores(len(tokens)):
            return None
        return self._cache.lookup(tokens, salt, on_done, decoding)

    def release(self, prefix: StoredPrefix | None) -> None:
        """Gives back a prefix with which no prefill has begun."""
        if self._cache is not None and prefix is not None:
            self._cache.release(prefix)

    def begin(
        self, prefill: Prefill, prefix: StoredPrefix | None, salt: str, generated: GeneratedTokens
    ) -> "PromptTransfer":
        """Claims a prefix for a prefill before its first unit, and prepares to store the rest of the prompt.

        Args:
            prefix: what it has not brought by now is not waited for. It is the transfer's from now on.
            generated: tokens that will follow, so that a store that keeps those as well can do so.
        """
        cache = self._cache
        if cache is None:
            return PromptTransfer(self._runner, prefill)
        if prefix is not None:
            prefill.reuse(cache.claim(prefix))
        writer = answer = None
        tokens = prefill.prompt[: prefill.length]
        if self._runner.layout.stores(prefill.length):
            writer = cache.insert(tokens, salt, prefix, generated.decoding)
            prefix = prefix if prefill.reused else None  # which the writer verifies otherwise
        if self._generated.cache is not None:
            parent = cache.parent_of(tokens, salt, prefix, generated.decoding)
            answer = self._generated.begin(parent, prefill.prompt, prefill.length, generated)
        return PromptTransfer(self._runner, prefill, cache, prefix, writer, answer, self._generated)

    def before_steps(self, alive: Bool[np.ndarray, "B"], count: int) -> None:
        """Gathers generated tokens before up to `count` steps: those that enter or a selection would make forget."""
        self._generated.before_steps(self._runner, alive, count)

    def leave(self, slot: int) -> None:
        """The slot's request has ended, whichever way."""
        self._generated.leave(self._runner.views, slot, self._runner.occupancy.length[slot])

    def measured(self, start: int, size: int, seconds: float) -> None:
        """Tells the store's planner that a unit, alone on the device, went through one layer group in `seconds`.

        A unit smaller than a block says little of the rate: it is dispatch more than work.
        """
        if self._cache is not None and size >= BLOCK_TOKENS:
            blocks = size / BLOCK_TOKENS
            middle = start / BLOCK_TOKENS + (blocks - 1) / 2
            self._cache.store.planner.computed(middle, seconds * len(self._runner.groups) / blocks)

    def warm_up(self) -> None:
        """Compiles what the transfers need beside the runner's steps."""
        self._generated.warm_up(self._runner.views)

    def check_integrity(self) -> None:
        """Raises AssertionError if anything is held for a request; waits for what is still being saved."""
        if self._cache is not None:
            self._cache.check_integrity()
        self._generated.check_integrity()


class PromptTransfer:
    """KV of one prompt: from the store into the workspaces of its prefill, and from these to the store."""

    def __init__(
        self,
        runner: Runner,
        prefill: Prefill,
        cache: PrefixCache | None = None,
        prefix: StoredPrefix | None = None,
        writer: PromptWriter | None = None,
        answer: GenerationWriter | None = None,
        generated: GenerationWriters | None = None,
    ) -> None:
        """`KVTransfers.begin` makes it."""
        self._runner, self._prefill, self._cache = runner, prefill, cache
        self._prefix, self._writer, self._answer, self._generated = prefix, writer, answer, generated
        self._under_way: tuple[int, int, int] | None = None  # group, start and size of the unit that is computed
        self._sliced = 0  # blocks of the group that were given to the writer, or that it does not want

    @property
    def cached_tokens(self) -> Mapping[str, int]:
        """Prompt tokens that are loaded instead of computed, by tier."""
        return {} if self._prefix is None else self._prefix.tokens

    def before_unit(self) -> None:
        """Loads the reused chunks of a group before its first unit; before the rest's tokens, gathers others."""
        prefill = self._prefill
        self._under_way = (prefill.group, *prefill.units[prefill.unit]) if prefill.in_groups else None
        if not prefill.in_groups:
            if self._generated is not None:
                alone = np.arange(self._runner.layout.max_num_seqs) == prefill.slot
                ahead = min(len(prefill.rest) - prefill.extended, EXTENSION)
                self._generated.before_steps(self._runner, alone, ahead)
            return
        if self._prefix is None or self._cache is None:
            return
        self._prefix.blocks.renew()
        if not prefill.starts_group:
            return
        counts = self._runner.load_counts(prefill.bucket, BLOCK_TOKENS)
        for place, layer in enumerate(self._runner.groups[prefill.group]):
            for start, blocks in self._cache.load(self._prefix, layer, counts):
                self._prefix.copies[layer] = self._runner.load_blocks(prefill, place, blocks, start)

    def after_unit(self) -> None:
        """Gives the blocks that a unit has completed to the store: later prompts find them behind the last group."""
        if self._under_way is None:
            return
        group, start, size = self._under_way
        last = self._prefill.group != group
        if self._writer is not None:
            self._slice(self._writer, group, start, size, last)
        if last and self._answer is not None and self._generated is not None:
            self._generated.tail(self._answer, self._runner, self._prefill, group)
        if last and not self._prefill.in_groups and self._writer is not None:
            self._writer.close()

    def _slice(self, writer: PromptWriter, group: int, start: int, size: int, last: bool) -> None:
        """Slices blocks out of the workspaces: those of a large unit at once, others one by one."""
        first, end = self._sliced, min((start + size) // BLOCK_TOKENS, self._prefill.length // BLOCK_TOKENS)
        if last and self._prefill.length % BLOCK_TOKENS:
            end += 1  # the tail
        while first < end:
            count = size // BLOCK_TOKENS if first * BLOCK_TOKENS == start and size >= BLOCK_TOKENS else 1
            count = count if first + count <= end else 1
            if any(writer.wants(block) for block in range(first, first + count)):
                for place, layer in enumerate(self._runner.groups[group]):
                    k, v = self._runner.slice_chunk(
                        self._prefill, group, place, first * BLOCK_TOKENS, count * BLOCK_TOKENS
                    )
                    writer.put(first, count, layer, k, v)
            first += count
        self._sliced = 0 if last else end

    def close(self) -> None:
        """Lets go of everything that the store holds for the prompt. May be called twice, and before it is done.

        Waits until the device has copied what it was given of the store's memory.
        """
        if self._writer is not None:
            self._writer.close()
        if self._prefix is not None and self._cache is not None:
            self._cache.release(self._prefix)
