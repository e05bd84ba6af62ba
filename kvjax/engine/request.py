"""Requests and their results: plain frozen data between the engine and its callers, no arrays, no threads.

Everything is validated once, here, before a token is computed: an `Engine` never sees a value out of
bounds. `ValueError` messages name the value, the bound and the field, and a server may show them as they are.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from kvjax.budget import LEAST_TOKEN_BUDGET

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 64
MAX_STOP_TOKENS = 8
MAX_BAD_WORDS = 128


class Finish(enum.StrEnum):
    """Why a request ended; the values are OpenAI's `finish_reason` where it has one."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = (
        "length"  # max_tokens is used up, or the model's context, or the headroom of views that are not selected anew
    )
    CANCELLED = "cancelled"
    ERROR = "error"


class ConstraintError(ValueError):
    """A grammar that cannot be compiled or followed; the message says why."""


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A grammar that generated text follows.

    Attributes:
        kind: `json` (a JSON Schema), `regex` (of the whole text), `choice` (a JSON list of texts) or `grammar` (Lark,
            or GBNF).
        source: its text.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: str

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError(f"an empty {self.kind} constrains nothing: leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and when to stop; the names, defaults and order of operations are vLLM's.

    `logit_bias` acts first, then penalties, temperature, `min_p`, `top_k` and `top_p`. Log-probabilities are
    those of the model itself: before penalties, bias and temperature.

    Attributes:
        max_tokens: most tokens to generate; None means as many as the context holds. 0 scores the prompt only.
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens. Tokens tied with the k-th are kept.
        seed: the same seed, prompt and parameters give the same text, whatever else the engine is doing.
        logprobs: how many alternatives to report a generated token; None for no log-probabilities.
        prompt_logprobs: the same for the prompt's own tokens.
        stop: strings that end the text; they are not part of it.
        min_tokens: no end-of-sequence or stop token before so many generated tokens.
        compress_after: choose what the views keep after so many tokens of the prompt, and read the others through the
            views: as if they came later, when what was not kept is gone. None chooses after the whole prompt.
        retained: report which tokens each layer kept of the prompt.
        token_budget: keep and read as an engine of this budget would, at most that of the engine; None is its own.
        turn: tokens at the prompt's end that are new since the last answer of its conversation; None for all of them.
            Methods of several turns ("rocketkv-mt") choose with the queries of these alone.
        constraint: a grammar that the text follows, to its end unless `max_tokens` comes first.
        allowed_token_ids: the only tokens that may be drawn; all of them if empty.
        bad_words: texts whose tokens are not drawn one after another.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    compress_after: int | None = None
    retained: bool = False
    token_budget: int | None = None
    turn: int | None = None
    constraint: Constraint | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()

    @property
    def constrained(self) -> bool:
        """Whether what may be drawn depends on what was drawn, or is not the whole vocabulary."""
        return self.constraint is not None or bool(self.allowed_token_ids or self.bad_words)

    def __post_init__(self) -> None:
        if self.token_budget is not None:
            _bounded("token_budget", self.token_budget, LEAST_TOKEN_BUDGET, 2**31 - 1)
        if self.turn is not None:
            _bounded("turn", self.turn, 1, 2**31 - 1)
        if self.compress_after is not None:
            _bounded("compress_after", self.compress_after, 1, 2**31 - 1)
            if self.prompt_logprobs is not None:
                raise ValueError("prompt_logprobs are those of the whole prompt: leave compress_after out")
        _bounded("temperature", self.temperature, 0.0, 100.0)
        _bounded("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _bounded("min_p", self.min_p, 0.0, 1.0)
        _bounded("top_k", self.top_k, 0, 2**31 - 1)
        _bounded("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _bounded("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _bounded("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _bounded("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _bounded("max_tokens", self.max_tokens, 0, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(f"min_tokens={self.min_tokens} is larger than max_tokens={self.max_tokens}")
        if self.seed is not None:
            _bounded("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _bounded(name, value, 0, MAX_LOGPROBS)
        if isinstance(self.stop, str):
            raise ValueError(f"stop={self.stop!r} is one string: give a tuple of strings, ({self.stop!r},)")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise ValueError(f"each stop string needs 1 to {MAX_STOP_LENGTH} characters; one has {len(text)}")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids holds {len(self.stop_token_ids)}; at most {MAX_STOP_TOKENS}")
        if any(token < 0 for token in self.allowed_token_ids):
            raise ValueError(f"allowed_token_ids={min(self.allowed_token_ids)} is negative: no token has that id")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words={len(self.bad_words)} texts: at most {MAX_BAD_WORDS} are allowed")
        if any(not word.strip() for word in self.bad_words):
            raise ValueError("bad_words='' is an empty text: leave it out")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias holds {len(self.logit_bias)} tokens; at most {MAX_LOGIT_BIAS}")
        for token, bias in self.logit_bias.items():
            _bounded(f"logit_bias[{token}]", bias, -100.0, 100.0)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability and the most likely alternatives at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Timing:
    """When a request passed each door, in seconds of `time.monotonic()`, and how its prompt was met.

    Attributes:
        view_fraction: bytes of KV the device kept for the request over the bytes of its full KV.
        prefix: prompt tokens by where their KV came from: `"computed"`, the name of a store's tier, or `"suspended"`.
        resumed: tokens that were generated before this request: it went on with a conversation that was suspended.
    """

    arrived: float
    scheduled: float
    first_token: float
    finished: float
    view_fraction: float = 1.0
    prefix: Mapping[str, int] = dataclasses.field(default_factory=dict)
    resumed: int = 0


@dataclasses.dataclass(frozen=True)
class Delta:
    """One step of a request's output, in order. The last one of a request carries `finish`.

    Attributes:
        text: new text, always whole characters; may be empty while a character or a stop string is undecided.
        tokens: the new token ids (a stop token is counted here but has no text).
        logprobs: one for each of `tokens` if asked for.
        prompt_logprobs: on the first delta if asked for: one for each prompt token; the first is None.
        retained: on the first delta if asked for: for each layer the positions [K, C] of the prompt that its view
            retains, -1 where it is empty. K is the number of query heads for methods that choose for each of them.
        cached_tokens: prompt tokens that came from the store instead of being computed.
        finish: set on the last delta only.
        stop_reason: the stop string or token id that ended the text; a sentence where the headroom of the views did;
            None for everything else.
        timing: set with `finish`, unless the request never left the queue.
        error: a sentence for the user when `finish` is `Finish.ERROR`.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    retained: tuple[np.ndarray, ...] | None = None
    cached_tokens: int = 0
    finish: Finish | None = None
    stop_reason: str | int | None = None
    timing: Timing | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request, as `Engine.generate` returns it: the deltas of one request joined."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    retained: tuple[np.ndarray, ...] | None = None
    cached_tokens: int = 0

    @classmethod
    def join(cls, prompt_tokens: Sequence[int], deltas: Sequence[Delta]) -> "Completion":
        """All deltas of one request, the last of which has finished it."""
        last = deltas[-1]
        assert last.finish is not None
        return cls(
            prompt_tokens=tuple(prompt_tokens),
            tokens=tuple(token for delta in deltas for token in delta.tokens),
            text="".join(delta.text for delta in deltas),
            finish=last.finish,
            stop_reason=last.stop_reason,
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            prompt_logprobs=deltas[0].prompt_logprobs,
            retained=deltas[0].retained,
            cached_tokens=max(delta.cached_tokens for delta in deltas),
        )


class ContextLengthExceededError(ValueError):
    """The prompt and what it asks to generate do not fit the model's context."""

    def __init__(self, prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_tokens + max_tokens}; this model's context is {max_model_len} tokens. "
            f"Shorten the prompt or lower max_tokens"
        )
        self.prompt_tokens, self.max_tokens, self.max_model_len = prompt_tokens, max_tokens, max_model_len


class QueueFullError(RuntimeError):
    """Every slot and every place in the queue is taken; try again later."""


class EngineDeadError(RuntimeError):
    """The engine is not running: not started, closed, or its thread has failed."""


class RequestFailedError(RuntimeError):
    """One request failed inside the engine; the others, and the engine, are well."""


def _bounded(name: str, value: int | float, low: int | float, high: int | float, *, open_low: bool = False) -> None:
    """Raises ValueError unless `low <= value <= high` (`low < value` with `open_low`); NaN is refused."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} is not a finite number")
    if not (low <= value <= high) or (open_low and value == low):  # NumPy has numbers that are no number and no float
        raise ValueError(f"{name}={value} is outside {'(' if open_low else '['}{low}, {high}]")
