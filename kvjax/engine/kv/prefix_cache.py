"""Prefix cache: the KV of earlier prompts, kept in a store, for prompts that begin as they did.

    lookup     starts to bring the stored blocks of a prompt's beginning to host memory, while the request waits
    claim      ends the lookup: what has come by then is used, and the rest is computed
    load       the claimed blocks of one layer, for a workspace
    insert     a writer for the chunks that are computed
    release    gives back what a lookup holds

Chunks, not blocks, are what is used: then the same kernels see the same shapes whether a prefix was computed or loaded,
and a warm answer equals a cold one bit for bit. Where the store keeps generated tokens too, a prompt may go on behind
its dense chunks with others (`generation_writer.py`).
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.runner import HostBlocks
from kvjax.engine.kv.executor import BackgroundExecutor
from kvjax.engine.kv.namespace import namespace
from kvjax.engine.kv.prompt_writer import PromptWriter
from kvjax.store.block import BlockLayout
from kvjax.store.keys import BLOCK_TOKENS, BlockKey, Namespace
from kvjax.store.opening import open_store
from kvjax.store.prefix_load import PrefixLoad
from kvjax.store.store import KVStore


@dataclasses.dataclass(eq=False)
class StoredPrefix:
    """Stored KV of one prompt's beginning, from `PrefixCache.lookup` on until it is released.

    Attributes:
        patience: most seconds that its request waits for it.
        chunks: how many are used, once it is claimed.
        copies: one array a layer that is there once the device has copied the layer's chunks.
    """

    blocks: PrefixLoad
    patience: float
    chunks: int = 0
    copies: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def ready_at(self) -> float:
        """When its request stops waiting for it, by `time.monotonic`; 0 once nothing more will come."""
        return 0.0 if self.blocks.done else self.blocks.started + self.patience

    @property
    def tokens(self) -> Mapping[str, int]:
        """Tokens that are used, by the tier that had them."""
        tiers = self.blocks.found if self.chunks else ()
        return {tier: BLOCK_TOKENS * count for tier, count in collections.Counter(tiers).items()}


class PrefixCache:
    """One model's KV in a store.

    Args:
        window: the last tokens of every prompt that are computed whatever is stored: stage 1 needs their queries.

    Attributes:
        executor: what copies new KV to the host and gives it to the store.
    """

    def __init__(self, store: KVStore, names: Namespace, chunk_size: int, window: int) -> None:
        self.store, self.chunk_size, self._namespace, self._window = store, chunk_size, names, window
        self.executor = BackgroundExecutor()
        self._random = random.Random()

    @classmethod
    def open(cls, path: Path, caches: CacheConfig, devices: int) -> "PrefixCache | None":
        """That of the checkpoint in folder `path`, in the store of the layout; None if it has none.

        Raises:
            TierError, ValueError, ImportError: the store cannot be opened; says why.
        """
        model, config = caches.model, caches.layout.store
        if config is None or not config.host_cache_size:
            return None
        layout = BlockLayout(model.num_layers, model.num_kv_heads, model.head_dim, caches.layout.kv_dtype)
        store = open_store(layout, config)
        return cls(store, namespace(path, caches, devices), caches.layout.prefill_chunk_size, caches.window)

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk."""
        return self.chunk_size // BLOCK_TOKENS

    def lookup(self, tokens: np.ndarray, salt: str, on_done: Callable[[], None], decoding: str = "") -> StoredPrefix:
        """Starts to bring the stored blocks of a prompt nearer, but for its last tokens. For any thread.

        Dense blocks as far as they go, and only then those of generated tokens, if the store keeps them.

        Args:
            on_done: called, from any thread, when nothing more will come.
            decoding: as for `names`.
        """
        chunks = max((len(tokens) - max(self._window, 1)) // self.chunk_size, 0)
        tokens = tokens[: chunks * self.chunk_size]
        generated = self.store.config.store_generated
        fork = (lambda end: self.names(tokens, salt, decoding, end)[end:]) if generated else None
        blocks = self.store.fetch(self.names(tokens, salt), unit=self.chunk_blocks, on_done=on_done, fork=fork)
        return StoredPrefix(blocks, self.store.config.patience(len(blocks.names) * BLOCK_TOKENS))

    def claim(self, prefix: StoredPrefix) -> int:
        """Chunks of a prefix to use: nothing more is brought. 0 where it is to be verified by computing it again."""
        prefix.blocks.stop()
        if self._random.random() >= self.store.config.verify_hits:
            self.store.count_hits(prefix.blocks.found)
            prefix.chunks = prefix.blocks.loaded // self.chunk_blocks
        return prefix.chunks

    def load(self, prefix: StoredPrefix, layer: int) -> Iterator[HostBlocks]:
        """K and V [K, BLOCK_TOKENS, D] of the blocks of each claimed chunk, in the memory of the store.

        A device that shares the host's memory may read them there: `StoredPrefix.copies` says when it has.

        Raises:
            LeaseExpiredError: the prefix was held for too long without being used.
        """
        layout = self.store.format
        for chunk in range(prefix.chunks):
            first = chunk * self.chunk_blocks
            yield tuple(layout.tensors(prefix.blocks.blob(first + i), layer) for i in range(self.chunk_blocks))

    def insert(
        self, tokens: np.ndarray, salt: str, prefix: StoredPrefix | None = None, decoding: str = ""
    ) -> PromptWriter:
        """Begins to store the whole chunks of a prompt behind those of its claimed prefix.

        Args:
            prefix: where none of its chunks are used, its dense blocks are compared with what is computed now, and it
                is the writer's from now on.
            decoding: as for `names`.
        """
        first = 0 if prefix is None else prefix.chunks
        dense = None if prefix is None else prefix.blocks.fork
        # behind chunks that decode steps had part in, the chain goes on from theirs
        fork = dense if dense is not None and first * self.chunk_blocks > dense else None
        names = self.names(tokens, salt, decoding, fork)
        parent = self.parent(names, salt, decoding) if fork is None else names[-1].key
        check = None if prefix is None or first else prefix.blocks
        return PromptWriter(
            self.store, self.executor, names[first * self.chunk_blocks :], self.chunk_blocks, parent, check
        )

    def release(self, prefix: StoredPrefix) -> None:
        """Gives every block back, once the device has copied it. May be called twice, and before it is claimed."""
        jax.block_until_ready(prefix.copies)
        prefix.blocks.close()

    def names(self, tokens: np.ndarray, salt: str, decoding: str = "", fork: int | None = None) -> list[BlockKey]:
        """Of all blocks of a prompt's whole chunks.

        Args:
            decoding: what decode steps compute (`CacheConfig.decoding`), which had part in block `fork` and behind it.
        """
        whole, dense = len(tokens) // self.chunk_size * self.chunk_size, None if fork is None else fork * BLOCK_TOKENS
        names = BlockKey.chain(self._namespace.root(salt), tokens[:whole][:dense])
        if fork is None:
            return names
        return names + BlockKey.chain(self.parent(names, salt, decoding), tokens[dense:whole])

    def parent(self, names: list[BlockKey], salt: str, decoding: str) -> bytes:
        """The key that the chain of generated tokens begins with behind these dense blocks."""
        return self._namespace.fork(names[-1].key if names else self._namespace.root(salt), decoding)

    def settle(self) -> None:
        """Waits until the executor has done all that it was given."""
        self.executor.settle()

    def check_integrity(self) -> None:
        """Raises AssertionError if something is left of a prompt; waits for what is still being saved."""
        self.settle()
        assert self.store.wait(60.0), "blocks are still on their way after a minute"
        self.store.check_integrity()

    def flush(self, timeout: float) -> bool:
        """Saves what was computed and writes it to the tiers below; returns whether that took less than `timeout` s."""
        self.settle()
        return self.store.flush(timeout)

    def close(self) -> None:
        """Ends the executor, after what it was given, and closes the store."""
        self.executor.close()
        self.store.close()
