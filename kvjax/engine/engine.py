"""Engine: a model that generates for many callers at once. The one door to everything below it."""

import asyncio
import dataclasses
import os
import pathlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import jax

from kvjax import models
from kvjax.engine.active_request import ActiveRequest, CallerGoneError, DeltaCallback
from kvjax.engine.batch import generate_batch
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.kernels import check_kernels, resolve_backend
from kvjax.engine.device.memory import check_fits, free_bytes
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.sampling import MAX_STOP_TOKEN_IDS
from kvjax.engine.kv.prefix_cache import PrefixCache
from kvjax.engine.request import (
    MAX_STOP_TOKENS,
    Completion,
    Constraint,
    Delta,
    EngineDeadError,
    SamplingParams,
)
from kvjax.engine.request_factory import RequestFactory
from kvjax.engine.scheduling.admission import Admission, Reservation
from kvjax.engine.scheduling.loop import EngineLoop
from kvjax.engine.startup.parts import EngineParts
from kvjax.engine.stats import EngineStats
from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.store.stats import TierStats

StrPath = str | os.PathLike[str]
CLOSE_SECONDS = 60.0  # the longest step, many times over
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
        path: StrPath,
        model_config: models.DecoderConfig,
        tokenizer: Tokenizer,
        config: EngineConfig,
    ) -> None:
        """`from_pretrained` reads these from a folder."""
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.layout = resolve_backend(ResolvedConfig.resolve(config, model_config.max_position, jax.default_backend()))
        if len(model_config.eos_token_ids) > MAX_STOP_TOKEN_IDS - MAX_STOP_TOKENS:
            raise ValueError(f"the model has {len(model_config.eos_token_ids)} end-of-sequence tokens; at most 8 fit")
        self.max_model_len = self.layout.max_model_len
        self._caches = CacheConfig.declare(model_config, self.layout)
        check_kernels(self._caches, config.tensor_parallel_size)
        self.model_name = pathlib.Path(path).name
        self.generation_defaults = models.sampling_defaults(path)
        self._phase: Phase = "loading"
        self._admission = Admission(config.max_num_seqs + config.max_num_queued_reqs)
        self._requests = RequestFactory(self._caches, tokenizer, config.seed)
        self._parts = EngineParts(pathlib.Path(path), self._caches, config.tensor_parallel_size, config.session_dir)

    @classmethod
    def from_pretrained(
        cls, path: StrPath, config: EngineConfig | None = None, *, chat_template: str | None = None
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
        if self.failure is not None:
            return "failed"
        return self._parts.phase if self._phase == "loading" else self._phase

    @property
    def _prefix(self) -> PrefixCache | None:
        return self._parts.prefix_cache

    @property
    def _runner(self) -> Runner | None:
        return self._parts.runner

    @property
    def _loop(self) -> EngineLoop | None:
        return self._parts.loop

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread; None while it is well. A failed engine does not come back."""
        return None if self._loop is None else self._loop.failure

    @property
    def caches(self) -> CacheConfig:
        """Tokens that each layer retains of a prompt and reads of it a step, in entries and in bytes."""
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
        self._parts.run()
        self._phase = "ready"

    def startup_report(self) -> str:
        """What start-up did and what fits, as lines for a person. Only once the engine is ready."""
        return self._parts.report()

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

        with self._admission.place(reservation):
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
        if self.phase != "ready":
            raise EngineDeadError(f"the engine is {self.phase}")
        default = params or SamplingParams()
        each = [default] * len(prompts) if isinstance(default, SamplingParams) else list(default)
        tokens = [self.tokenizer.encode(p) if isinstance(p, str) else [int(t) for t in p] for p in prompts]
        for prompt, own in zip(tokens, each, strict=True):
            self._requests.check(prompt, own)
        return generate_batch(tokens, each, self._submit, self._cancel, lambda: self.failure is not None, progress)

    def check_constraint(self, constraint: Constraint) -> None:
        """Compiles a grammar for the requests that will have it. Slow. Raises ConstraintError, which says why not."""
        self._requests.check_constraint(constraint)

    def stats(self) -> EngineStats:
        """Snapshot of what the engine is doing. Answers in every phase."""
        if self._loop is None:
            return EngineStats()
        return dataclasses.replace(self._loop.stats(), compiles_after_warmup=self._parts.compiles.count)

    def store_stats(self) -> dict[str, TierStats]:
        """Contents and counters of each tier of the KV store, the nearest first; {} without a store."""
        return {} if self._prefix is None else self._prefix.store.stats()

    def drain(self, timeout: float) -> None:
        """Takes no new requests, finishes those that hold a place, and cancels what is left after `timeout` seconds.

        With a `session_dir`, the next engine goes on with those of them that decode.
        Blocks until all of them have ended, and what they computed is stored, as far as the time allows: about a second
        behind `timeout` it returns, but for the time that suspended conversations take to be written.
        """
        self._admission.close()
        if self._phase == "ready":
            self._phase = "draining"
        deadline = time.monotonic() + timeout
        empty = self._admission.wait_empty(timeout)
        self._parts.drain(deadline, cancel=not empty)

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Ends the engine's thread and frees the device; requests still there end with an error.

        Returns whether all has ended within about `timeout` seconds. A step or a tier that hangs is left to end by
        itself, in daemon threads.
        """
        self._admission.close()
        ended = self._parts.close(timeout)
        self._phase = "stopped"
        return ended

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

    def _submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_delta: DeltaCallback,
        request_id: str,
        cache_salt: str = "",
    ) -> ActiveRequest:
        request = self._requests.make(prompt, params, on_delta, request_id, cache_salt)
        if self._loop is None or self.failure is not None:
            raise EngineDeadError(f"the engine is {self.phase}")
        self._loop.submit(request)
        return request

    def _cancel(self, request: ActiveRequest) -> None:
        if self._loop is not None and not request.finished:
            self._loop.cancel(request)
