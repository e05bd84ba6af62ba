"""The engine: a model that generates for many callers at once. The one door to everything below it."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import queue
import random
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import models
from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.engine.admission import Admission, Reservation
from kvjax.engine.caches import CacheConfig
from kvjax.engine.compiles import CompileCounter
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.kernels import check_kernels, settle
from kvjax.engine.limit import limit
from kvjax.engine.loop import EngineLoop
from kvjax.engine.memory import InsufficientMemoryError, check_fits, free_bytes
from kvjax.engine.prefix import PrefixCache
from kvjax.engine.report import startup_report
from kvjax.engine.request import (
    MAX_STOP_TOKENS,
    Completion,
    Delta,
    EngineDeadError,
    Finish,
    RequestFailedError,
    SamplingParams,
)
from kvjax.engine.runner import Runner
from kvjax.engine.sampling import MAX_STOP_TOKEN_IDS
from kvjax.engine.sequence import ActiveRequest, CallerGoneError, DeltaCallback
from kvjax.engine.sessions import SessionStore
from kvjax.engine.stats import EngineStats
from kvjax.engine.suspended import SuspendedSlots
from kvjax.engine.tokenizer import Tokenizer
from kvjax.models.sharding import tensor_mesh
from kvjax.store.digest import weights_digest
from kvjax.store.stats import TierStats

logger = logging.getLogger(__name__)

LEAST_FLUSH = 1.0  # seconds for the store at the end, however long the last requests took

Phase = Literal["loading", "compiling", "ready", "draining", "stopped", "failed"]


class Engine:
    """Generates text with one model; safe to use from several threads and event loops.

    As a context manager it starts on entry and closes on exit:

        with Engine.from_pretrained("path/to/model") as engine:
            [completion] = engine.generate(["Once upon a time"], SamplingParams(max_tokens=32))

    Attributes:
        phase: where it is between loading and stopped.
        max_model_len: most tokens of one sequence, prompt and generated.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model_config: models.DecoderConfig,
        tokenizer: Tokenizer,
        config: EngineConfig,
    ) -> None:
        """`from_pretrained` reads these from a folder."""
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.layout = settle(ResolvedConfig.resolve(config, model_config.max_position, jax.default_backend()))
        if len(model_config.eos_token_ids) > MAX_STOP_TOKEN_IDS - MAX_STOP_TOKENS:
            raise ValueError(f"the model has {len(model_config.eos_token_ids)} end-of-sequence tokens; at most 8 fit")
        self.max_model_len = self.layout.max_model_len
        self._caches = CacheConfig.declare(model_config, self.layout)
        self._devices = config.tensor_parallel_size
        check_kernels(self._caches, self._devices)
        self.model_name = pathlib.Path(path).name
        self._path = path
        self._phase: Phase = "loading"
        self._admission = Admission(config.max_num_seqs + config.max_num_queued_reqs)
        self._seeds = random.Random(config.seed)
        self._counter = CompileCounter()
        self._seconds: dict[str, float] = {}
        self._prefix: PrefixCache | None = None
        self._suspend, self._restored = config.session_dir, 0
        self._suspending: SessionStore | None = None
        self._runner: Runner | None = None
        self._loop: EngineLoop | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        *,
        chat_template: str | None = None,
    ) -> "Engine":
        """Reads the configuration and the tokenizer of a model in the Hugging Face format; `start` reads its weights.

        Raises:
            FileNotFoundError: there is no model in that folder.
            ValueError: the model or the configuration cannot be served; the message says what to change.
        """
        tokenizer = Tokenizer.from_pretrained(path, chat_template)
        return cls(path, models.read_config(path), tokenizer, config or EngineConfig())

    @property
    def phase(self) -> Phase:
        return "failed" if self.failure is not None else self._phase

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread; None while it is well. A failed engine does not come back."""
        return None if self._loop is None else self._loop.failure

    @property
    def caches(self) -> CacheConfig:
        """What each layer keeps of a prompt and reads of it a step, in entries and in bytes."""
        return self._caches

    @property
    def view_bytes(self) -> int:
        """Bytes of K and V in the views of all slots, counted from the arrays on the device; 0 before `start`."""
        return 0 if self._runner is None else sum(view.k.nbytes + view.v.nbytes for view in self._runner.views)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's output; token ids are below."""
        return self.model_config.vocab_size

    def start(self) -> None:
        """Loads the weights, compiles every step and starts serving. Blocks for seconds to minutes.

        Raises:
            InsufficientMemoryError: it does not fit on the devices; the message says what would.
            TierError, ValueError, ImportError: a tier of the store cannot be opened; the message says why.
        """
        check_fits(self.model_config, self.layout, free_bytes())
        try:
            self._start()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InsufficientMemoryError(
                f"a device ran out of memory while {self._phase}: lower --max-num-seqs from {self.layout.max_num_seqs} or "
                f"--max-model-len from {self.max_model_len} ({str(error).splitlines()[0]})"
            ) from error

    def _check_budgets(self) -> None:
        """Refuses a profile that was found for other weights."""
        budgets = self.layout.budgets
        if budgets is not None and BudgetProfile.made_for(budgets).weights is not None:
            weights = weights_digest(pathlib.Path(self._path))
            BudgetProfile.load(budgets, ModelFingerprint.of(self.model_config, weights))

    def _start(self) -> None:
        with self._timed("store"):  # first: a folder or a URL that is wrong is said at once
            self._prefix = PrefixCache.open(pathlib.Path(self._path), self._caches, self._devices)
            mesh = tensor_mesh(self._devices)
            if self._suspend is not None:
                self._suspending = SessionStore.open(self._suspend, pathlib.Path(self._path), self._caches, mesh)
        with self._timed("weights"):
            self._check_budgets()
            model = models.load(
                self._path, dtype=jnp.dtype(self.layout.dtype), mesh=mesh, max_model_len=self.max_model_len
            )
        with self._timed("allocate"):
            self._runner = Runner(model, self._caches, mesh, self._prefix)
        self._phase = "compiling"
        with self._timed("compile"):
            self._compiled = self._runner.warm_up()
        suspended = SuspendedSlots(self._runner)
        if self._suspending is not None:
            with self._timed("suspended"):
                self._restored = suspended.restore(self._suspending)
        self._counter.start()
        self._loop = EngineLoop(self._runner, suspended)
        self._loop.start()
        self._phase = "ready"
        if self._suspending is not None:  # now, for an engine that ends before it is ready saves nothing
            self._suspending.consume()

    def startup_report(self) -> str:
        """What start-up did and what fits, as lines for a person. Only once the engine is ready."""
        assert self._runner is not None
        restored = None if self._suspending is None else self._restored
        return startup_report(self._runner, self._seconds, self._compiled, restored)

    def reserve(self, count: int = 1) -> Reservation:
        """Holds places for `count` requests, before any work is spent on them.

        Raises:
            QueueFullError: every slot and every place in the queue is taken, or the engine is shutting down.
        """
        return self._admission.reserve(count)

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        reservation: Reservation | None = None,
        cache_salt: str = "",
        request_id: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Generates for one prompt of token ids; leaving the iteration cancels the request and frees its slot.

        Args:
            reservation: from `reserve`; one of its places is used. Without, a place is taken now.
            cache_salt: requests of different salts never share stored KV.
            request_id: for logs and the state of the slots.

        Raises:
            ContextLengthExceededError: prompt and `max_tokens` exceed `max_model_len`.
            ValueError: the prompt is empty or holds a token that the model does not have, or the engine does not serve
                a token budget (`CacheConfig.within`).
            QueueFullError: there is no place left.
            EngineDeadError: the engine has failed.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta] = asyncio.Queue()

        def on_delta(delta: Delta) -> None:
            try:
                loop.call_soon_threadsafe(deltas.put_nowait, delta)
            except RuntimeError as error:  # the loop is closed
                raise CallerGoneError from error

        with self._place(reservation):
            request = self._submit(prompt, params, on_delta, request_id, cache_salt)
            try:
                while not (delta := await deltas.get()).finish:
                    yield delta
                yield delta
            finally:
                self._cancel(request)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Completion]:
        """Generates for a batch of prompts, texts or token ids, and returns the completions in their order.

        Args:
            params: one for all prompts, or one each.
            progress: show a bar with requests and tokens a second.

        Raises:
            ValueError: as `stream`, before anything is generated.
            EngineDeadError: the engine is not ready, or fails on the way.
            RequestFailedError: one of the requests failed; the others are cancelled.
        """
        from tqdm.auto import tqdm

        if self.phase != "ready":
            raise EngineDeadError(f"the engine is {self.phase}")
        given = params or SamplingParams()
        each = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
        tokens = [self.tokenizer.encode(p) if isinstance(p, str) else [int(t) for t in p] for p in prompts]
        for prompt, its_params in zip(tokens, each, strict=True):
            limit(self._caches, prompt, its_params)
        results: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
        requests: list[ActiveRequest] = []
        received: list[list[Delta]] = [[] for _ in prompts]
        bar = tqdm(total=len(prompts), unit="req", disable=not progress)
        began, generated, unfinished = time.monotonic(), 0, len(prompts)
        try:
            for index, (prompt, its_params) in enumerate(zip(tokens, each, strict=True)):
                on_delta = lambda delta, index=index: results.put((index, delta))  # noqa: E731
                requests.append(self._submit(prompt, its_params, on_delta, f"batch-{index}"))
            while unfinished:
                index, delta = results.get()
                received[index].append(delta)
                generated += len(delta.tokens)
                if delta.finish is Finish.ERROR:
                    raise (EngineDeadError if self.failure else RequestFailedError)(delta.error)
                if delta.finish:
                    unfinished -= 1
                    bar.set_postfix_str(f"{generated / (time.monotonic() - began):,.0f} tok/s", refresh=False)
                    bar.update()
        finally:
            bar.close()
            for request in requests:
                self._cancel(request)
        return [Completion.join(prompt, deltas) for prompt, deltas in zip(tokens, received, strict=True)]

    def stats(self) -> EngineStats:
        """What the engine is doing now. GenerationWriters in every phase."""
        if self._loop is None:
            return EngineStats()
        return dataclasses.replace(self._loop.stats(), compiles_after_warmup=self._counter.count)

    def store_stats(self) -> dict[str, TierStats]:
        """What each tier of the KV store holds and has done, the nearest first; {} without a store."""
        return {} if self._prefix is None else self._prefix.store.stats()

    def drain(self, timeout: float) -> None:
        """Takes no new requests, finishes those that hold a place, and cancels what is left after `timeout` seconds.

        Where the engine suspends, the next one goes on with those of them that decode (`EngineConfig.park`).
        Blocks until all of them have been told, and what they computed is stored as far as the time allows.
        """
        self._admission.close()
        if self._phase == "ready":
            self._phase = "draining"
        deadline = time.monotonic() + timeout
        empty = self._admission.wait_empty(timeout)
        if self._loop is not None:
            done = self._loop.wait_idle(max(deadline - time.monotonic(), 0.0)) and empty
            if self._suspending is not None:
                self._suspending.save(self._loop.suspend())
            elif not done:
                self._loop.cancel_all()
            self._loop.wait_idle(5.0)
        if self._prefix is not None:
            written = self._prefix.flush(max(deadline - time.monotonic(), LEAST_FLUSH))
            logger.info("every block is stored" if written else "some blocks could not be stored in time")

    def close(self) -> None:
        """Ends the engine's thread and frees the device; requests still there end with an error."""
        self._admission.close()
        if self._loop is not None:
            self._loop.stop()
        self._counter.stop()
        if self._runner is not None:
            self._runner.free()
        if self._prefix is not None:
            self._prefix.close()
        self._prefix = self._runner = None
        self._phase = "stopped"

    def check_integrity(self) -> None:
        """Raises AssertionError if an idle engine still holds anything of a request."""
        self._admission.check_integrity()
        if self._loop is not None:
            self._loop.check_integrity()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _place(self, reservation: Reservation | None) -> Iterator[None]:
        if reservation is not None:
            with reservation.use():
                yield
        else:
            with self.reserve() as own, own.use():
                yield

    def _submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_delta: DeltaCallback,
        request_id: str,
        cache_salt: str = "",
    ) -> ActiveRequest:
        most, limited_by = limit(self._caches, prompt, params)
        if self._loop is None or self.failure is not None:
            raise EngineDeadError(f"the engine is {self.phase}")
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        caches = self._caches.within(params.token_budget)
        request = ActiveRequest(
            request_id,
            np.asarray(prompt, np.int32),
            params,
            self.tokenizer,
            on_delta,
            stop_token_ids=(*eos, *params.stop_token_ids),
            limit=most,
            limited_by=limited_by,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            cache_salt=cache_salt,
            plans=caches.plans,
            decoding=caches.decoding,
            view_fraction=caches.retained_bytes(len(prompt)) / caches.full_bytes(len(prompt)),
        )
        self._loop.submit(request)
        return request

    def _cancel(self, request: ActiveRequest) -> None:
        if self._loop is not None and not request.finished:
            self._loop.cancel(request)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[phase] = time.monotonic() - began
