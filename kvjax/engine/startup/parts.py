"""Engine parts: what stands behind the engine's door, from the start, phase by phase, to the end."""

import contextlib
import logging
import pathlib
import time
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from kvjax import models
from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.compiles import CompileCounter
from kvjax.engine.device.memory import InsufficientMemoryError
from kvjax.engine.device.runner import Runner
from kvjax.engine.kv.namespace import namespace, open_kv_store
from kvjax.engine.kv.prefix_cache import PrefixCache
from kvjax.engine.kv.transfers import KVTransfers
from kvjax.engine.scheduling.loop import EngineLoop
from kvjax.engine.sessions.snapshot import SessionStore
from kvjax.engine.sessions.suspended import SuspendedSlots
from kvjax.engine.startup.report import startup_report
from kvjax.models.sharding import tensor_mesh
from kvjax.store.digest import weights_digest
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.store import CLOSING, KVStore

logger = logging.getLogger(__name__)
LAST_SECONDS = 1.0  # behind the deadline of `drain`: for requests to end and blocks to be written
LEAST_FLUSH = 0.25  # seconds for the store, however long the last requests took
SUSPENDING = 15.0  # seconds for the running step to end, so that conversations can be suspended


class EngineParts:
    """The parts of one engine. Each is None until its phase has begun, and stays if a later phase fails.

    Attributes:
        phase: the part of the start that is under way.
        compiles: counts XLA compilations from the end of the warm-up on.
    """

    def __init__(self, path: pathlib.Path, caches: CacheConfig, devices: int, session_dir: pathlib.Path | None) -> None:
        self.phase: Literal["loading", "compiling"] = "loading"
        self.store: KVStore | None = None
        self.prefix_cache: PrefixCache | None = None
        self.session_store: SessionStore | None = None
        self.runner: Runner | None = None
        self.loop: EngineLoop | None = None
        self.compiles = CompileCounter()
        self._path, self._caches, self._devices, self._session_dir = path, caches, devices, session_dir
        self._seconds: dict[str, float] = {}
        self._compiled: dict[str, float] = {}
        self._restored: int | None = None

    def run(self) -> None:
        """Makes every part and starts the loop.

        Raises:
            InsufficientMemoryError: a device has run out of memory.
            TierError, ValueError, ImportError: a tier of the store cannot be opened; the message says why.
        """
        try:
            self._run()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            layout = self._caches.layout
            raise InsufficientMemoryError(
                f"a device ran out of memory while {self.phase}: lower --max-num-seqs from {layout.max_num_seqs} or "
                f"--max-model-len from {layout.max_model_len} ({str(error).splitlines()[0]})"
            ) from error

    def _run(self) -> None:
        caches, path = self._caches, self._path
        with self._timed("store"):  # first: a folder or a URL that is wrong ends the start at once
            self.store = open_kv_store(caches)
            mesh = tensor_mesh(self._devices)
            if self._session_dir is not None:
                self.session_store = SessionStore.open(self._session_dir, path, caches, mesh)
        with self._timed("weights"):
            check_budgets(path, caches)
            dtype, length = jnp.dtype(caches.layout.dtype), caches.layout.max_model_len
            decoder = models.load(path, dtype=dtype, mesh=mesh, max_model_len=length)
        with self._timed("allocate"):
            self.runner = Runner(decoder, caches, mesh)
        self.phase = "compiling"
        with self._timed("compile"):
            self._compiled = self.runner.warm_up(None if self.store is None else BLOCK_TOKENS)
            if self.store is not None:
                names = namespace(path, caches, self._devices)
                self.prefix_cache = PrefixCache(self.store, names, self.runner.sizes[0], caches.window)
            transfers = KVTransfers(self.runner, self.prefix_cache)
            transfers.warm_up()
        suspended = SuspendedSlots(self.runner)
        if self.session_store is not None:
            with self._timed("suspended"):
                self._restored = suspended.restore(self.session_store)
        self.compiles.start()
        self.loop = EngineLoop(self.runner, transfers, suspended)
        self.loop.start()
        if self.session_store is not None:  # now, for an engine that ends before it is ready saves nothing
            self.session_store.consume()

    def report(self) -> str:
        """What start-up did and what fits, as lines for a person."""
        assert self.runner is not None
        return startup_report(self.runner, self.store, self._seconds, self._compiled, self._restored)

    def drain(self, deadline: float, cancel: bool) -> None:
        """Waits for running requests, then suspends or cancels those that are left, and stores what they computed.

        Args:
            deadline: by `time.monotonic`. It returns about `LAST_SECONDS` behind it at the latest, but for the time
                that suspended conversations take to be written.
            cancel: requests may be left whatever the loop says: some hold a place that it has not seen.
        """
        if self.loop is not None:
            done = self.loop.wait_idle(max(deadline - time.monotonic(), 0.0)) and not cancel
            if self.session_store is not None:
                self.session_store.save(self.loop.suspend(SUSPENDING))
            elif not done:
                self.loop.cancel_all()
            self.loop.wait_idle(max(deadline + LAST_SECONDS - time.monotonic(), LEAST_FLUSH))
        if self.prefix_cache is not None:
            last = deadline if time.monotonic() < deadline else deadline + LAST_SECONDS
            written = self.prefix_cache.flush(max(last - time.monotonic(), LEAST_FLUSH))
            logger.info("every block is stored" if written else "some blocks could not be stored in time")

    def close(self, timeout: float) -> bool:
        """Ends the loop, frees the device and closes the store, as far as they are there.

        Returns whether all has ended within about `timeout` seconds; what hangs is left to end by itself.
        """
        end = time.monotonic() + timeout
        stopped = ended = self.loop is None or self.loop.stop(timeout)
        self.compiles.stop()
        if self.runner is not None and stopped:  # a loop that hangs may yet use it
            self.runner.free()
        left = max(end - time.monotonic(), 0.0)
        if self.prefix_cache is not None:
            ended &= self.prefix_cache.close(left)
        elif self.store is not None:
            ended &= self.store.close(min(left, CLOSING))
        self.store = self.prefix_cache = self.runner = None
        return ended

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[phase] = time.monotonic() - began


def check_budgets(path: pathlib.Path, caches: CacheConfig) -> None:
    """Refuses a profile of budgets that was made for other weights than those in folder `path`."""
    budgets = caches.layout.budgets
    if budgets is not None and BudgetProfile.made_for(budgets).weights is not None:
        BudgetProfile.load(budgets, ModelFingerprint.of(caches.model, weights_digest(path)))
