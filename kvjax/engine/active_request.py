"""Active request: one on its way through the engine, with the tokens that it has generated and delivered."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.attention.methods import LayerCacheConfig
from kvjax.engine.kv.generation_writer import GeneratedTokens
from kvjax.engine.kv.prefix_cache import StoredPrefix
from kvjax.engine.request import Delta, Finish, SamplingParams, Timing, TokenLogprob
from kvjax.engine.text.constraints import TokenConstraint
from kvjax.engine.text.detokenizer import CONTEXT, Detokenizer, StopStrings
from kvjax.engine.text.tokenizer import Tokenizer

DeltaCallback = Callable[[Delta], None]  # may raise CallerGoneError


class CallerGoneError(Exception):
    """The caller of a request is gone: its deltas cannot be delivered, and it should leave."""


class ActiveRequest:
    """A request and its progress. Only the engine's thread changes it, but for `cancelled`.

    Attributes:
        prompt: token ids [T] int32.
        stop_token_ids: tokens that end the text: the model's own unless ignored, and the request's.
        limit: most tokens it may generate; `limited_by` says what to do about it where the request asks for more.
        seed: of its draws.
        prefix: stored KV of the prompt, computed for an earlier one of the same `cache_salt`, until its prefill begins.
        constraint: what it may generate, where that is not everything.
        cached: tokens of the prompt whose KV was not computed again, by the tier that had it.
        plans: tokens that each layer retains and reads, where the request has a token budget of its own.
        for_store: the tokens that it has generated, for the store.
        view_fraction: bytes of KV that the device keeps of the prompt, over those of its full KV.
        cancelled: set by the caller's thread; the engine takes the request out soon after.
        finished: the last delta is out; whatever the device still produces for it is ignored.
        arrived: when it came, in seconds of `time.monotonic()`.
        tokens, logprobs: what it has generated; `resumed` of these tokens before it came.
    """

    def __init__(
        self,
        request_id: str,
        prompt: np.ndarray,
        params: SamplingParams,
        tokenizer: Tokenizer,
        on_delta: DeltaCallback,
        *,
        stop_token_ids: tuple[int, ...],
        limit: int,
        seed: int,
        limited_by: str | None = None,
        plans: Sequence[LayerCacheConfig] | None = None,
        view_fraction: float = 1.0,
        cache_salt: str = "",
        decoding: str = "",
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.limit = limit
        self.limited_by = limited_by
        self.seed = seed
        self.plans = plans
        self.view_fraction = view_fraction
        self.cache_salt = cache_salt
        self.constraint = constraint
        self.for_store = GeneratedTokens(decoding, limit)
        self.prefix: StoredPrefix | None = None
        self.cached: dict[str, int] = {}
        self.cancelled = False
        self.finished = False
        self.arrived = time.monotonic()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.resumed = 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.retained: tuple[np.ndarray, ...] | None = None
        self._on_delta = on_delta
        self._detokenizer = Detokenizer(tokenizer, prompt[-CONTEXT:].tolist())
        self._stops = StopStrings(params.stop)
        self._delivered = False
        self._scheduled: float | None = None
        self._first_token: float | None = None

    @property
    def ready_at(self) -> float:
        """When it stops waiting for its stored KV, in seconds of `time.monotonic()`; 0 if there is none to wait for."""
        return 0.0 if self.prefix is None else self.prefix.ready_at

    def refresh(self) -> bool:
        """Looks again for stored KV, as its turn has come; returns whether it should wait for more."""
        return self.prefix is not None and self.prefix.refresh()

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    @property
    def generated(self) -> int:
        return len(self.tokens)

    @property
    def stepwise(self) -> bool:
        """Whether each of its tokens has to be known before the next is drawn."""
        return self.constraint is not None

    def scheduled(self) -> None:
        """The request has got its slot."""
        self._scheduled = time.monotonic()

    def accept(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Takes the next tokens from the device and delivers them; after the one that ends it, no more."""
        shown, used, finish, reason = "", 0, None, None
        for token in tokens:
            used += 1
            self.tokens.append(token)
            if token in self.stop_token_ids:
                finish = Finish.STOP
                reason = token if token in self.params.stop_token_ids else None
            else:
                if self.constraint is not None:
                    self.constraint.accept(token)
                text = self._detokenizer.push([token])
                if self.generated >= self.params.min_tokens:
                    text, reason = self._stops.push(text)
                shown += text
                if reason is not None or (self.constraint is not None and self.constraint.complete):
                    finish = Finish.STOP
                elif self.generated >= self.limit:
                    finish = Finish.LENGTH
            if finish is not None:
                break
        self.for_store.tokens += tokens[:used]
        if finish is not None and not isinstance(reason, str):
            text, late = self._stops.push(self._detokenizer.flush())
            shown += text if late else text + self._stops.flush()
            if late:
                finish, reason = Finish.STOP, late
            elif finish is Finish.LENGTH:
                reason = self.limited_by
        self.logprobs += logprobs[:used]
        if self._first_token is None:
            self._first_token = time.monotonic()
        self._deliver(shown, tuple(tokens[:used]), tuple(logprobs[:used]), finish, reason)

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Ends the request without another token."""
        if not self.finished:
            self._deliver(finish=finish, error=error)

    def _deliver(
        self,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish: Finish | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        self.finished = finish is not None
        prompt_logprobs, retained = (None, None) if self._delivered else (self.prompt_logprobs, self.retained)
        self._delivered = True
        timing = self._timing() if self.finished else None
        self._on_delta(
            Delta(
                text=text,
                tokens=tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                retained=retained,
                cached_tokens=self.cached_tokens,
                finish=finish,
                stop_reason=stop_reason,
                timing=timing,
                error=error,
            )
        )

    def _timing(self) -> Timing | None:
        if self._scheduled is None:
            return None
        now = time.monotonic()
        prefix = {**self.cached, "computed": len(self.prompt) - self.cached_tokens}
        return Timing(
            arrived=self.arrived,
            scheduled=self._scheduled,
            first_token=self._first_token or now,
            finished=now,
            view_fraction=self.view_fraction,
            prefix=prefix,
            resumed=self.resumed,
        )
