"""An engine without a model: real slots, a real queue, real cancellation, and scripted tokens.

Its tokenizer writes one token a byte, so a character may take four tokens. It keeps what was asked of it, and
`check_integrity` holds that every slot and every place came back.
"""

import asyncio
import codecs
import contextlib
import dataclasses
import random
import threading
import time
import types
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import ClassVar

import numpy as np

from kvjax.attention.eviction import Streaming
from kvjax.attention.methods import LayerCacheConfig
from kvjax.engine.request import (
    ConstraintError,
    ContextLengthExceededError,
    Delta,
    Finish,
    QueueFullError,
    SamplingParams,
    Timing,
    TokenLogprob,
)
from kvjax.engine.stats import EngineStats, SlotStats
from kvjax.store.stats import TierStats

BOS, EOS, VOCABULARY = 256, 257, 258
REPLY = "Hello, wörld! 🙂"


class FakeTokenizer:
    """One token a byte, plus a beginning and an end that are special."""

    vocab_size = VOCABULARY

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template
        self.roles = ("system", "user", "assistant")
        self.encode_seconds = 0.0
        self.encoded = 0
        self.max_token_characters: int | None = None
        self.template = f"one of {self.roles}"

    @property
    def chat_template(self) -> str | None:
        return self.template if self.has_chat_template else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.encoded += 1
        time.sleep(self.encode_seconds)
        return [BOS] * add_special_tokens + list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [id for id in ids if id < 256 or not skip_special_tokens]
        return b"".join(self.token_bytes(id) for id in shown).decode("utf-8", "replace")

    def render(
        self, messages, *, add_generation_prompt=True, continue_final_message=False, tools=None, variables=None
    ) -> str:
        self.rendered = {"messages": messages, "tools": tools, "variables": variables}
        text = ""
        for message in messages:
            if message["role"] not in self.roles:
                raise ValueError(f"the chat template refuses these messages: no role {message['role']!r}")
            text += f"<{message['role']}>{message['content']}\n"
        if continue_final_message:
            text = text.removesuffix("\n")
        return text + "<assistant>" * add_generation_prompt

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>"}.get(token, bytes([token % 256]))


def reply_script(prompt: list[int], params: SamplingParams) -> list[int]:
    """A fixed sentence when greedy; else letters that depend on the seed alone."""
    if params.temperature == 0:
        return [*REPLY.encode("utf-8"), EOS]
    draw = random.Random(params.seed)
    return [*(draw.randrange(97, 123) for _ in range(12)), EOS]


@dataclasses.dataclass
class FakeReservation:
    engine: "FakeEngine"
    count: int
    used: int = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.engine.reserved -= self.count - self.used
        self.count = self.used

    def take(self) -> None:
        assert self.used < self.count, "more streams than places were reserved"
        self.used += 1


class FakeEngine:
    """Attributes:

    script: what to generate for a prompt.
    prefill_seconds, token_seconds: how long it takes. hold: nothing moves until it is set.
    fail_after: Finish.ERROR instead of the token of that index.
    hangs: methods that never return, of drain and close.
    asked: every stream's prompt, parameters, salt and id. cancelled: ids that were stopped from outside.
    """

    model_name = "fake"
    generation_defaults: ClassVar[dict[str, float]] = {}
    vocab_size = VOCABULARY

    def __init__(
        self,
        *,
        slots: int = 2,
        queue: int = 8,
        max_model_len: int = 512,
        script: Callable[[list[int], SamplingParams], list[int]] = reply_script,
        prefill_seconds: float = 0.0,
        token_seconds: float = 0.0,
        fail_after: int | None = None,
        phase: str = "ready",
        chat_template: bool = True,
        hangs: Sequence[str] = (),
    ) -> None:
        self.hangs = hangs
        self.tokenizer = FakeTokenizer(has_chat_template=chat_template)
        self.max_model_len = max_model_len
        self.script, self.fail_after = script, fail_after
        self.prefill_seconds, self.token_seconds = prefill_seconds, token_seconds
        self.start_seconds = 0.0
        self.hold: threading.Event | None = None
        self.phase, self.failure = phase, None
        self.raise_at_stream: Exception | None = None
        self.asked: list[tuple[list[int], SamplingParams, str, str]] = []
        self.cancelled: list[str] = []
        self.compiles = 0
        self.closed = False
        self.caches, self.view_fraction = FakeCacheConfig(max_model_len), 1.0
        self.reserved = 0
        self._capacity = slots + queue
        self._slots: list[SlotStats] = [SlotStats("free")] * slots
        self._free = asyncio.Semaphore(slots)
        self._waiting = 0
        self._deadline_passed = threading.Event()
        self._counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "finished", "cancelled", "failed"), 0)

    def start(self) -> None:
        self.phase = "compiling"
        time.sleep(self.start_seconds)
        if isinstance(self.failure, Exception):
            self.phase = "failed"
            raise self.failure
        self.phase = "ready"

    def startup_report(self):
        return [("weights", "0.0 s"), ("compile", "nothing")]

    def reserve(self, count: int = 1) -> FakeReservation:
        if self.phase != "ready" or self.reserved + count > self._capacity:
            raise QueueFullError(f"{self._capacity} places are taken")
        self.reserved += count
        return FakeReservation(self, count)

    async def stream(
        self, prompt, params, *, reservation=None, cache_salt="", request_id=""
    ) -> AsyncGenerator[Delta, None]:
        reservation = reservation or self.reserve()
        reservation.take()
        arrived = time.monotonic()
        self.asked.append((list(prompt), params, cache_salt, request_id))
        try:
            if self.raise_at_stream is not None:
                raise self.raise_at_stream
            headroom = self.max_model_len - len(prompt)
            limit = headroom if params.max_tokens is None else params.max_tokens
            if limit > headroom:
                raise ContextLengthExceededError(len(prompt), limit, self.max_model_len)
            async with self._slot(request_id, len(prompt)) as slot:
                async for delta in self._generate(prompt, params, limit, arrived, slot):
                    yield delta
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request_id)
            self._counts["cancelled"] += 1
            raise
        finally:
            self.reserved -= 1

    @contextlib.asynccontextmanager
    async def _slot(self, request_id: str, tokens: int):
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        index = next(i for i, slot in enumerate(self._slots) if slot.state == "free")
        self._slots[index] = SlotStats("prefill", request_id, tokens)
        try:
            yield index
        finally:
            self._slots[index] = SlotStats("free")
            self._free.release()

    async def _generate(self, prompt, params, limit, arrived, slot) -> AsyncGenerator[Delta, None]:
        scheduled = time.monotonic()
        stopped = await self._pause(self.prefill_seconds)
        self._slots[slot] = dataclasses.replace(self._slots[slot], state="decode", progress=1.0)
        self._counts["prompt_tokens"] += len(prompt)
        first = time.monotonic()
        scores = None
        if params.prompt_logprobs is not None:
            scores = (None, *(logprob(token, params.prompt_logprobs) for token in prompt[1:]))
        retained = retained_of(len(prompt)) if params.retained else None
        writer = Writer(params)
        generated, finish = 0, None
        while finish is None:
            tokens: tuple[int, ...] = ()
            reason: str | int | None = None
            text = ""
            if stopped:
                finish = Finish.CANCELLED
            elif generated == self.fail_after:
                yield Delta(finish=Finish.ERROR, error="the device ran out of something")
                self._counts["failed"] += 1
                return
            elif generated >= limit:
                finish, text = Finish.LENGTH, writer.rest()
            else:
                script = self.script(list(prompt), params)
                token = script[generated % len(script)]
                stopped = await self._pause(self.token_seconds)
                tokens, generated = (token,), generated + 1
                self._counts["generated_tokens"] += 1
                if token == EOS and not params.ignore_eos:
                    finish, text = Finish.STOP, writer.rest()
                elif token in params.stop_token_ids:
                    finish, text, reason = Finish.STOP, writer.rest(), token
                else:
                    text, reason = writer.write(token)
                    finish = Finish.STOP if reason is not None else None
                    if finish is None and generated >= limit:
                        finish, text = Finish.LENGTH, text + writer.rest()
            timing = None
            if finish is not None:
                self._counts["finished"] += 1
                now = time.monotonic()
                timing = Timing(arrived, scheduled, first, now, self.view_fraction, {"computed": len(prompt)})
            chosen = () if params.logprobs is None else tuple(logprob(id, params.logprobs) for id in tokens)
            yield Delta(
                text=text,
                tokens=tokens,
                logprobs=chosen,
                prompt_logprobs=scores,
                retained=retained,
                finish=finish,
                stop_reason=reason,
                timing=timing,
            )
            scores = retained = None

    async def _pause(self, seconds: float) -> bool:
        """Waits; True if the drain's deadline passed meanwhile."""
        end = time.monotonic() + seconds
        while not self._deadline_passed.is_set():
            held, left = self.hold is not None and not self.hold.is_set(), end - time.monotonic()
            if not held and left <= 0:
                break
            await asyncio.sleep(0.01 if held else min(left, 0.02))
        await asyncio.sleep(0)
        return self._deadline_passed.is_set()

    def check_constraint(self, constraint) -> None:
        if "invalid" in constraint.source:
            raise ConstraintError(f"{constraint.kind}: it is invalid")

    def stats(self) -> EngineStats:
        running = sum(slot.state != "free" for slot in self._slots)
        return EngineStats(
            slots=tuple(self._slots),
            waiting=self._waiting,
            running=running,
            compiles_after_warmup=self.compiles,
            **self._counts,
        )

    def drain(self, timeout: float) -> None:
        self.phase = "draining"
        if "drain" in self.hangs:
            threading.Event().wait()
        end = time.monotonic() + timeout
        while self.reserved and time.monotonic() < end:
            time.sleep(0.01)
        self._deadline_passed.set()
        while self.reserved:
            time.sleep(0.01)
        self.phase = "stopped"

    def close(self, timeout: float = 1.0) -> bool:
        self.closed = True
        if "close" in self.hangs:
            print("closing", flush=True)
            threading.Event().wait()
        return True

    def store_stats(self) -> dict[str, TierStats]:
        held = {"blocks": 3, "used_bytes": 3 << 20, "capacity_bytes": 8 << 20}
        return {
            "host": TierStats(**held, hits=5, written=3),
            "disk": TierStats(**held, hits=2, errors={"corrupt": 1}),
            "remote": TierStats(breaker="open", errors={"timeout": 4}),
        }

    def check_integrity(self) -> None:
        assert self.reserved == 0, f"{self.reserved} places were not given back"
        assert self._waiting == 0
        assert all(slot.state == "free" for slot in self._slots), self._slots


class FakeCacheConfig:
    """Two layers, one of which keeps 100 entries and the other all of them."""

    multi_turn = False

    def __init__(self, context: int) -> None:
        self.layout = types.SimpleNamespace(method="rocketkv", token_budget=64, headroom=16, max_model_len=context)
        self.plans = (
            LayerCacheConfig(116, Streaming(), max_retained=100),
            LayerCacheConfig(context),
        )

    def within(self, token_budget: int | None) -> "FakeCacheConfig":
        if token_budget is not None and not 32 <= token_budget <= 64:
            raise ValueError(f"token_budget={token_budget} is outside [32, 64], give one within")
        return self

    def full_bytes(self, length: int) -> int:
        return 200 * length

    def retained_bytes(self, length: int) -> int:
        return 100 * (min(length, 100) + length)

    def read_bytes(self, length: int) -> int:
        return 20 * length


def retained_of(length: int) -> tuple[np.ndarray, ...]:
    """Positions [K, C] of a prompt: two heads that keep the last 8 tokens, then one that keeps all and one nothing."""
    last = np.full((2, 116), -1, np.int32)
    last[:, :8] = np.arange(length - 8, length)
    every = np.full((2, 512), -1, np.int32)
    every[0, :length] = np.arange(length)
    return last, every


class Writer:
    """Tokens to text: whole characters only, and nothing that may still become a stop string."""

    def __init__(self, params: SamplingParams) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._held = params.stop, ""

    def write(self, token: int) -> tuple[str, str | None]:
        self._held += self._decoder.decode(bytes([token])) if token < 256 else ""
        for stop in self._stops:
            before, found, _ = self._held.partition(stop)
            if found:
                self._held = ""
                return before, stop
        max_retained = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        text, self._held = self._held[: len(self._held) - max_retained], self._held[len(self._held) - max_retained :]
        return text, None

    def rest(self) -> str:
        text, self._held = self._held + self._decoder.decode(b"", True), ""
        return text


def logprob(token: int, count: int) -> TokenLogprob:
    """Even tokens are the likeliest of their place, odd ones come second."""
    best = token if token % 2 == 0 else token - 1
    top = [(best, -0.25), (best + 1, -1.5), (0, float("-inf"))]
    return TokenLogprob(token, dict(top)[token], tuple(top[:count]))
