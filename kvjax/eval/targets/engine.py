"""An `Engine` in this process as the target of an evaluation: requests share its continuous batch."""

import asyncio
import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kvjax.engine import Delta, Engine, EngineConfig, EngineDeadError, Finish, QueueFullError, SamplingParams
from kvjax.engine.config import ResolvedConfig
from kvjax.eval.targets.target import (
    Footprint,
    Prompt,
    Target,
    TargetError,
    TargetFailedError,
    TargetGoneError,
    TargetReply,
    TargetRequest,
)

_GRACE_SECONDS = 5.0
_ENDS = 1 << 20  # bytes read at either end of a file for its fingerprint


class EngineTarget(Target):
    """An engine, which the caller starts before the first `complete` and closes after the last."""

    def __init__(
        self, engine: Engine, identity: Mapping[str, str] | None = None, *, token_budget: int | None = None
    ) -> None:
        """`identity` defaults to the name of the model, which does not identify its weights.

        `token_budget` is that of each request; None is the engine's own.
        """
        self.engine, self._token_budget = engine, token_budget
        # a prompt is counted, sent, and compared with its context prefix and its history
        self._encode = functools.lru_cache(maxsize=512)(engine.tokenizer.encode)
        self.name = f"{engine.model_name}{_described(engine.layout)}"
        self.max_model_len = engine.max_model_len
        self.identity = dict(identity or {"model": engine.model_name})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], config: EngineConfig | None = None) -> "EngineTarget":
        """The engine of a model folder, not started yet.

        Raises:
            TargetError: there is no model in the folder, or the engine cannot run it.
        """
        try:
            engine = Engine.from_pretrained(folder, config)
        except (ValueError, OSError, NotImplementedError) as error:
            raise TargetError(f"{os.fspath(folder)}: {error}") from error
        identity = {"model": Path(folder).resolve().name, "files": fingerprint(Path(folder))}
        return cls(engine, identity | {"dtype": engine.layout.dtype} | compression(engine.layout))

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            # the engine still delivers the ends of cancelled requests, which a closed event loop could not take
            deadline = time.monotonic() + _GRACE_SECONDS
            while self._busy() and time.monotonic() < deadline:
                await asyncio.sleep(0.01)

    def count(self, prompt: Prompt) -> int:
        return len(self._tokens(prompt))

    async def complete(self, request: TargetRequest) -> TargetReply:
        tokens = self._tokens(request.prompt)
        history = request.history
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
            compress_after=self._compress_after(request.context_prefix, tokens),
            turn=None if history is None else max(len(tokens) - self.shared(history, tokens), 1),
            token_budget=self._token_budget,
        )
        text, count, first, began = "", 0, None, time.monotonic()
        last = Delta()
        try:
            async with contextlib.aclosing(self.engine.stream(tokens, params)) as deltas:
                async for last in deltas:
                    text += last.text
                    count += len(last.tokens)
                    if first is None and last.tokens:
                        first = time.monotonic()
        except EngineDeadError as error:
            raise TargetGoneError(str(error)) from error
        except QueueFullError as error:
            raise TargetFailedError(f"{error or 'the queue is full'}: lower --concurrency") from error
        except ValueError as error:
            raise TargetFailedError(str(error)) from error
        if last.finish is Finish.ERROR and self.engine.failure is not None:
            raise TargetGoneError(last.error or "the engine could not finish the request")
        if last.finish not in (Finish.STOP, Finish.LENGTH):
            raise TargetFailedError(f"the request ended with {last.finish}: {last.error or 'no reason given'}")
        now = time.monotonic()
        return TargetReply(text, str(last.finish), len(tokens), count, (first or now) - began, now - began)

    def footprint(self, length: int) -> Footprint | None:
        caches = self.engine.caches.within(self._token_budget)
        if caches.layout.method == "full":
            return None
        return Footprint(caches.retained_bytes(length), caches.read_bytes(length), caches.full_bytes(length))

    def _busy(self) -> bool:
        stats = self.engine.stats()
        return stats.submitted > stats.finished + stats.cancelled + stats.failed

    def retained(
        self, prompt: Prompt, context_prefix: Prompt | None = None
    ) -> tuple[list[int], tuple[Int[np.ndarray, "_ _"], ...]]:
        """The prompt's tokens, and for each layer the positions [K, C] that its view retains, -1 where empty.

        Blocks; `context_prefix` as in `TargetRequest`. K is the query heads where each retains its own.

        Raises:
            TargetFailedError: the engine refuses the prompt.
        """
        tokens = self._tokens(prompt)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            compress_after=self._compress_after(context_prefix, tokens),
            token_budget=self._token_budget,
            retained=True,
        )
        try:
            [completion] = self.engine.generate([tokens], params, progress=False)
        except ValueError as error:
            raise TargetFailedError(str(error)) from error
        assert completion.retained is not None
        return tokens, completion.retained

    def shared(self, context_prefix: Prompt, tokens: Sequence[int]) -> int:
        """The leading tokens that `context_prefix` shares; at least 1, for a method chooses by a query."""
        pairs = zip(self._tokens(context_prefix), tokens, strict=False)
        return max(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), 1)

    def _compress_after(self, context_prefix: Prompt | None, tokens: Sequence[int]) -> int | None:
        return None if context_prefix is None else self.shared(context_prefix, tokens)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt)
        try:
            return self.engine.tokenizer.apply_chat_template(prompt)
        except ValueError as error:
            raise TargetFailedError(str(error)) from error


def compression(layout: ResolvedConfig) -> dict[str, str]:
    """The identity of an engine's cache compression; empty where the cache is full.

    The longest sequence is part of it: a method may make a token budget's views larger for longer ones.
    """
    if layout.method == "full":
        return {}
    named = {"method": layout.method, "headroom": str(layout.headroom), "max_model_len": str(layout.max_model_len)}
    if layout.budgets is None:
        return named | {"token_budget": str(layout.token_budget)}
    return named | {"budgets": hashlib.sha256(Path(layout.budgets).read_bytes()).hexdigest()[:12]}


def fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits that change with a model's weights, configuration or tokenizer.

    Of each file it reads the length and at most a MiB at either end: gigabytes of weights cost nothing.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:12]


def _described(layout: ResolvedConfig) -> str:
    """An engine's cache compression, for headings."""
    if layout.method == "full":
        return ""
    of = f"{layout.token_budget} tokens" if layout.budgets is None else Path(layout.budgets).name
    return f", {layout.method} of {of}"
