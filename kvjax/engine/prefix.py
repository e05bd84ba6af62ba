"""Between the steps and the store: KV of a prompt's beginning that need not be computed, and of new chunks to keep.

    begin      chunks whose blocks the store has brought to host memory
    a group    its workspaces are filled from the blocks; its new chunks are cut out, and a thread takes them away
    the last   the new blocks are sealed, and may be found from then on

Chunks, not blocks, are what is used: then the same kernels see the same shapes whether a prefix was computed or loaded,
and a warm answer equals a cold one bit for bit.

Where the store keeps generated tokens too, a prompt may go on behind its dense chunks with others (`generation_writer.py`).
"""

import logging
import queue
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from kvjax.engine.caches import CacheConfig
from kvjax.store.block import BlockLayout
from kvjax.store.block_writer import BlockWriter
from kvjax.store.digest import files_digest, known_digests, weights_digest
from kvjax.store.keys import BLOCK_TOKENS, BlockKey, Namespace
from kvjax.store.opening import open_store
from kvjax.store.prefix_load import PrefixLoad
from kvjax.store.store import KVStore

logger = logging.getLogger(__name__)
Work = Callable[[], None]
AHEAD = 32  # chunks of layers on their way to the host at once: each holds device memory until it is there
OFFERS = 8  # and so do these, of generated tokens: a block in all layers each


def namespace(path: Path, caches: CacheConfig, devices: int) -> Namespace:
    """What must be equal for stored KV to be used. A new compiler, another device or other kernels compute other
    last digits.

    Args:
        path: the folder of the checkpoint, or its file, every tensor of which is read, unless its digest is known
            already.
    """
    tokenizer = [*path.glob("tokenizer*"), *path.glob("*.model")] if path.is_dir() else [path]
    device, model, layout = jax.devices()[0], caches.model, caches.layout
    numerics = (
        f"jax {jax.__version__}, {devices} x {device.device_kind}, {layout.dtype}, chunk {layout.prefill_chunk_size}"
    )
    if layout.attention_backend != "reference":
        numerics += f", kernels {layout.attention_backend}"
    return Namespace(
        weights=weights_digest(path),
        tokenizer=files_digest(tokenizer, known_digests()),
        rope=repr([layer.rope for layer in model.layers]),
        numerics=numerics,
        dtype=layout.kv_dtype,
        shape=f"{model.num_layers} x {model.num_kv_heads} x {model.head_dim}",
    )


class PrefixCache:
    """One model's KV in a store.

    Args:
        window: the last tokens of every prompt that are computed whatever is stored: stage 1 needs their queries.
    """

    def __init__(self, store: KVStore, names: Namespace, chunk_size: int, window: int) -> None:
        self.store, self.chunk_size, self._namespace, self._window = store, chunk_size, names, window
        self._random = random.Random()
        self._work: queue.SimpleQueue[tuple[Work, threading.Semaphore] | None] = queue.SimpleQueue()
        self._room, self._offers = threading.Semaphore(AHEAD), threading.Semaphore(OFFERS)
        self._thread = threading.Thread(target=self._run, name="kvjax-save", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, caches: CacheConfig, devices: int) -> "PrefixCache | None":
        """That of the checkpoint in folder `path`, in the store of the layout; None if it has none.

        Raises:
            TierError, ValueError, ImportError: the store cannot be opened; says why.
        """
        model, config = caches.model, caches.layout.store
        if config is None or not config.host_cache_size:
            return None
        format = BlockLayout(model.num_layers, model.num_kv_heads, model.head_dim, caches.layout.kv_dtype)
        store = open_store(format, config)
        return cls(store, namespace(path, caches, devices), caches.layout.prefill_chunk_size, caches.window)

    @property
    def _unit(self) -> int:
        return self.chunk_size // BLOCK_TOKENS

    def names(self, tokens: np.ndarray, salt: str, decoding: str = "", fork: int | None = None) -> list[BlockKey]:
        """Of all blocks of a prompt's whole chunks.

        Args:
            decoding: says what decode steps do (`CacheConfig.decoding`), which had part in block `fork` and what is behind.
        """
        whole, dense = len(tokens) // self.chunk_size * self.chunk_size, None if fork is None else fork * BLOCK_TOKENS
        names = BlockKey.chain(self._namespace.root(salt), tokens[:whole][:dense])
        if fork is None:
            return names
        return names + BlockKey.chain(self.parent(names, salt, decoding), tokens[dense:whole])

    def parent(self, names: list[BlockKey], salt: str, decoding: str) -> bytes:
        """What the chain of generated tokens begins with behind these dense blocks."""
        return self._namespace.fork(names[-1].key if names else self._namespace.root(salt), decoding)

    def fetch(self, tokens: np.ndarray, salt: str, on_done: Callable[[], None], decoding: str = "") -> PrefixLoad:
        """Starts to bring what is stored of a prompt nearer, but for its last tokens.

        Dense blocks as far as they go, and only then those of generated tokens, if the store keeps them.
        """
        most = max((len(tokens) - max(self._window, 1)) // self.chunk_size, 0)
        tokens = tokens[: most * self.chunk_size]
        generated = self.store.config.store_generated
        fork = (lambda end: self.names(tokens, salt, decoding, end)[end:]) if generated else None
        return self.store.fetch(self.names(tokens, salt), unit=self._unit, on_done=on_done, fork=fork)

    def take(self, fetch: PrefixLoad) -> int:
        """How many chunks of a fetch to use; from now on it brings no more. None at all if it is to be checked."""
        fetch.stop()
        if self._random.random() < self.store.config.verify_hits:
            return 0
        self.store.count_hits(fetch.found)
        return fetch.loaded // self._unit

    def chunks(self, fetch: PrefixLoad, layer: int, count: int) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], ...]]:
        """K and V [K, BLOCK_TOKENS, D] of the blocks of the first `count` chunks of one layer, in the memory of the store.

        A device that shares the host's memory may read them there, so the fetch must stay open until it has.

        Raises:
            LeaseExpiredError: the fetch does not hold them any more.
        """
        format = self.store.format
        for chunk in range(count):
            yield tuple(format.tensors(fetch.blob(chunk * self._unit + block), layer) for block in range(self._unit))

    def save(
        self, tokens: np.ndarray, salt: str, first: int, fetch: PrefixLoad | None = None, decoding: str = ""
    ) -> "PromptWriter":
        """Begins to keep the whole chunks of a prompt from chunk `first` on.

        Args:
            fetch: what was found of it. Where nothing of that is used it is compared with what is computed now, as far
                as that is dense prefill, and is the saver's from now on.
            decoding: as for `names`.
        """
        check = None if first else fetch
        # behind chunks that decode steps had part in, the chain goes on from theirs
        fork = fetch.fork if fetch is not None and first * self._unit > fetch.fork else None
        names = self.names(tokens, salt, decoding, fork)
        parent = self.parent(names, salt, decoding) if fork is None else names[-1].key
        return PromptWriter(self, names[first * self._unit :], self._unit, parent, check)

    def put(self, work: Work) -> None:
        """Has the saving thread do something; waits while it is far behind."""
        self._room.acquire()
        self._work.put((work, self._room))

    def offer(self, begin: Callable[[], Work]) -> bool:
        """Has the saving thread do what `begin` returns, or refuses while it is far behind: never waits."""
        if not self._offers.acquire(blocking=False):
            return False
        self._work.put((begin(), self._offers))
        return True

    def settle(self) -> None:
        """Waits until the saving thread has done all that it was given."""
        done = threading.Event()
        self.put(done.set)
        done.wait()

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
        """Ends the thread, after what it was given, and closes the store."""
        self._work.put(None)
        self._thread.join()
        self.store.close()

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            work, room = given
            try:
                work()
            except Exception:  # what is not saved is computed again
                logger.exception("saving KV failed")
            finally:
                del given, work  # and the arrays that came with it
                room.release()


class PromptWriter:
    """New chunks of one prompt on their way to the host. The engine's thread calls; another one copies.

    Attributes:
        parent: the key that generated tokens behind them go on from.
    """

    def __init__(
        self, cache: PrefixCache, names: list[BlockKey], unit: int, parent: bytes, check: PrefixLoad | None = None
    ) -> None:
        self._cache, self._names, self._unit, self.parent, self._check = cache, names, unit, parent, check
        self._saving: BlockWriter | None = None
        self.chunks = len(names) // unit
        cache.put(self._begin)

    def put(self, chunk: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        """K and V [K, chunk, D] of one layer of a new chunk, counted from the first new one."""
        self._cache.put(lambda: self._fill(chunk, layer, k, v))

    def seal(self) -> None:
        """All layers of all chunks were put."""
        self._cache.put(self._seal)

    def give_up(self) -> None:
        """The prompt will not be finished; no effect after `seal`."""
        self._cache.put(self._end)

    def _begin(self) -> None:
        self._saving = self._cache.store.save(self._names)

    def _fill(self, chunk: int, layer: int, k: jax.Array, v: jax.Array) -> None:
        if self._saving is None:  # it could not begin, or has been given up
            return
        keys, values = np.asarray(k), np.asarray(v)  # waits for the device
        for index in range(chunk * self._unit, (chunk + 1) * self._unit):
            rows = slice(index % self._unit * BLOCK_TOKENS, (index % self._unit + 1) * BLOCK_TOKENS)
            if index in self._saving.wanted:
                self._saving.fill(index, layer, keys[:, rows], values[:, rows])
            if self._check is not None and index < min(self._check.loaded, self._check.fork):
                stored = self._cache.store.format.tensors(self._check.blob(index), layer)
                same = all(
                    a.tobytes() == b.tobytes() for a, b in zip(stored, (keys[:, rows], values[:, rows]), strict=True)
                )
                self._cache.store.checked(self._names[index], same)

    def _seal(self) -> None:
        if self._saving is not None:
            self._saving.seal()
        self._end()

    def _end(self) -> None:
        if self._saving is not None:
            self._saving.close()
            self._saving = None
        if self._check is not None:
            self._check.close()
            self._check = None
