"""Prefix cache: the KV of earlier prompts, kept in a store, for prompts that begin as they did.

    lookup     starts to bring the stored blocks of a prompt's beginning to host memory, while the request waits
    refresh    looks again when its turn comes: what others have computed counts, also if it is still under way
    claim      ends the lookup: what has come by then is used, and the rest is computed
    load       the claimed blocks of one layer, for a workspace
    insert     a writer for the blocks that are computed
    release    gives back what a lookup holds

A prompt is stored in whole blocks, and its tail, which fills none, under a key of its own: an equal prompt computes
its last tokens alone. What is computed behind stored blocks is computed in sizes that give a row the same bits as every
other, so that a warm answer equals a cold one bit for bit. Where the store keeps generated tokens too, a prompt may go
on behind its dense blocks with others (`generation_writer.py`).
"""

import collections
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from kvjax.engine.device.runner import HostBlocks
from kvjax.engine.kv.executor import BackgroundExecutor
from kvjax.engine.kv.prompt_writer import PromptWriter
from kvjax.store.keys import BLOCK_TOKENS, BlockKey, Namespace
from kvjax.store.prefix_load import PrefixLoad
from kvjax.store.store import CLOSING, KVStore


@dataclasses.dataclass(eq=False)
class StoredPrefix:
    """Stored KV of one prompt's beginning, from `PrefixCache.lookup` on until it is released.

    Attributes:
        length: tokens of the prompt that go through dense prefill.
        longest_wait: most seconds that its request waits for it.
        used: tokens that are used, once it is claimed.
        copies: one array a layer that is there once the device has copied the layer's blocks.
    """

    store: KVStore
    blocks: PrefixLoad
    length: int
    longest_wait: float
    used: int = 0
    copies: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def ready_at(self) -> float:
        """When its request stops waiting for it, by `time.monotonic`; 0 once nothing more is on its way."""
        bounded = self.store.config.prefetch_policy == "timeout"
        return self.blocks.ready_at(self.longest_wait, bounded=bounded)

    def refresh(self) -> bool:
        """Looks again for what others have computed; returns whether that is worth waiting for.

        Not again after a wait that was in vain: then the prompt is computed.
        """
        late = self.blocks.admitted and not self.blocks.done
        return not late and self.store.refresh(self.blocks)

    @property
    def used_blocks(self) -> int:
        return -(-self.used // BLOCK_TOKENS)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens that are used, by the tier that had them."""
        tokens: collections.Counter[str] = collections.Counter()
        for block, tier in enumerate(self.blocks.found[: self.used_blocks]):
            tokens[tier] += min(self.used - block * BLOCK_TOKENS, BLOCK_TOKENS)
        return dict(tokens)


class PrefixCache:
    """One model's KV in a store.

    Args:
        step: tokens that a used prefix is a multiple of: the smallest unit of a prefill.
        window: the last tokens of every prompt that are computed whatever is stored: stage 1 needs their queries.

    Attributes:
        executor: what copies new KV to the host and gives it to the store.
    """

    def __init__(self, store: KVStore, names: Namespace, step: int, window: int) -> None:
        self.store, self._namespace, self._step, self._window = store, names, step, max(window, 1)
        self.executor = BackgroundExecutor()
        self._random = random.Random()

    def lookup(self, tokens: np.ndarray, salt: str, on_done: Callable[[], None], decoding: str = "") -> StoredPrefix:
        """Starts to bring the stored blocks of a prompt nearer. For any thread.

        Dense blocks as far as they go, and only then those of generated tokens, if the store keeps them.

        Args:
            on_done: called, from any thread, when nothing more will come.
            decoding: as for `keys`.
        """
        generated = self.store.config.store_generated
        chain = (lambda end: self.keys(tokens, salt, decoding, end)[end:]) if generated else None
        blocks = self.store.load(self.keys(tokens, salt), on_done=on_done, chain=chain)
        return StoredPrefix(self.store, blocks, len(tokens), self.store.config.patience(len(tokens)))

    def claim(self, prefix: StoredPrefix) -> int:
        """Tokens of a prefix to use: nothing more is brought. 0 where it is to be verified by computing it again."""
        blocks = prefix.blocks
        blocks.stop()
        if self._random.random() >= self.store.config.verify_hits:
            loaded = min(blocks.loaded * BLOCK_TOKENS, prefix.length - self._window)
            generated = blocks.loaded > blocks.dense_prefix_length
            step = max(self._step, BLOCK_TOKENS) if generated else self._step  # blocks that decode steps computed stay
            prefix.used = max(loaded // step * step, 0)
            self.store.count_hits(blocks.found[: prefix.used_blocks])
        return prefix.used

    def load(self, prefix: StoredPrefix, layer: int, counts: Sequence[int]) -> Iterator[tuple[int, HostBlocks]]:
        """K and V [K, BLOCK_TOKENS, D] of the claimed blocks, in the memory of the store, with their first position.

        A device that shares the host's memory may read them there: `StoredPrefix.copies` says when it has.

        Args:
            counts: numbers of blocks that may be given at once, the largest first and 1 last.

        Raises:
            LeaseExpiredError: the prefix was held for too long without being used.
        """
        layout, first = self.store.layout, 0
        while first < prefix.used_blocks:
            count = next(count for count in counts if count <= prefix.used_blocks - first)
            yield (
                first * BLOCK_TOKENS,
                tuple(layout.tensors(prefix.blocks.blob(first + index), layer) for index in range(count)),
            )
            first += count

    def insert(
        self, tokens: np.ndarray, salt: str, prefix: StoredPrefix | None = None, decoding: str = ""
    ) -> PromptWriter:
        """Begins to store what a prompt has of blocks that are not stored.

        Args:
            prefix: claimed. Where nothing of it is used, its dense blocks are compared with what is computed now, and
                it is the writer's from now on.
            decoding: as for `keys`.
        """
        keys = self.keys(tokens, salt, decoding, self._fork(prefix))
        check = None if prefix is None or prefix.used else prefix.blocks
        return PromptWriter(self.store, self.executor, keys, len(tokens), check)

    def parent_of(self, tokens: np.ndarray, salt: str, prefix: StoredPrefix | None, decoding: str) -> BlockKey:
        """What the chain of generated tokens behind a prompt goes on from: its key and its last whole block's."""
        fork = self._fork(prefix)
        keys = self.keys(tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS], salt, decoding, fork)
        parent = self.fork(keys, salt, decoding) if fork is None else keys[-1].key
        return BlockKey(parent, b"", b"", keys[-1].key if keys else b"")

    def release(self, prefix: StoredPrefix) -> None:
        """Gives every block back, once the device has copied it. May be called twice, and before it is claimed."""
        jax.block_until_ready(prefix.copies)
        prefix.blocks.close()

    def keys(self, tokens: np.ndarray, salt: str, decoding: str = "", fork: int | None = None) -> list[BlockKey]:
        """Of all blocks of a prompt, and of its tail where all of them are dense.

        Args:
            decoding: what decode steps compute (`CacheConfig.decoding`), which had part in block `fork` and behind it.
        """
        if fork is None:
            return BlockKey.chain(self._namespace.root(salt), tokens, tail=True)
        dense = BlockKey.chain(self._namespace.root(salt), tokens[: fork * BLOCK_TOKENS])
        previous = dense[-1].key if dense else b""
        return dense + BlockKey.chain(self.fork(dense, salt, decoding), tokens[fork * BLOCK_TOKENS :], previous)

    def fork(self, keys: list[BlockKey], salt: str, decoding: str) -> bytes:
        """The key that the chain of generated tokens begins with behind these dense blocks."""
        return self._namespace.fork(keys[-1].key if keys else self._namespace.root(salt), decoding)

    @staticmethod
    def _fork(prefix: StoredPrefix | None) -> int | None:
        """The first block that decode steps had part in, behind a claimed prefix; None where all are dense."""
        if prefix is None or prefix.used_blocks <= prefix.blocks.dense_prefix_length:
            return None
        return prefix.blocks.dense_prefix_length

    def check_integrity(self) -> None:
        """Raises AssertionError if something is left of a prompt; waits for what is still being saved."""
        assert self.executor.settle(60.0), "blocks are still being saved after a minute"
        assert self.store.wait(60.0), "blocks are still on their way after a minute"
        self.store.check_integrity()

    def flush(self, timeout: float) -> bool:
        """Saves what was computed and writes it to the tiers below; returns whether that took less than `timeout` s."""
        end = time.monotonic() + timeout
        settled = self.executor.settle(timeout)
        return self.store.flush(max(end - time.monotonic(), 0.0)) and settled

    def close(self, timeout: float) -> bool:
        """Ends the executor, after what it was given, and closes the store; returns whether both ended in time.

        Args:
            timeout: seconds, of which the store takes at most `CLOSING`.
        """
        end = time.monotonic() + timeout
        ended = self.executor.close(timeout)
        return self.store.close(min(max(end - time.monotonic(), 0.0), CLOSING)) and ended
