"""Monitor: the last two minutes of a server, sampled once a second, for the page. Holds numbers only."""

import asyncio
import collections
import dataclasses
import statistics
import time
from typing import Any

import kvjax
from kvjax.serve.metrics import Metrics
from kvjax.serve.protocol import CacheConfigProtocol, EngineProtocol
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.stats import TierStats

HISTORY = 120
RATE_WINDOW = 6  # samples: five seconds and the one now
RECENT_REQUESTS = 256


@dataclasses.dataclass(frozen=True)
class RateSample:
    """One second: `generated` is the engine's counter at `time`, seconds of `time.monotonic()`."""

    time: float
    generated: int
    running: int
    waiting: int


class Monitor:
    """Samples the engine in `run` and answers `state` at any time."""

    def __init__(self, engine: EngineProtocol, model_name: str, metrics: Metrics) -> None:
        self._engine, self._model, self._metrics = engine, model_name, metrics
        self._compression = _compression(engine.caches)
        self._started = time.monotonic()
        self._samples: collections.deque[RateSample] = collections.deque(maxlen=HISTORY + 1)
        self._first_tokens: collections.deque[float] = collections.deque(maxlen=RECENT_REQUESTS)

    async def run(self, interval: float = 1.0) -> None:
        """Samples until cancelled."""
        while True:
            self._samples.append(self._sample())
            await asyncio.sleep(interval)

    def first_token(self, seconds: float) -> None:
        """A request got its first token after so long."""
        self._first_tokens.append(seconds)

    def state(self) -> dict[str, Any]:
        """The engine now and over the last two minutes, as JSON."""
        engine, stats = self._engine, self._engine.stats()
        samples = [*self._samples, self._sample()]
        return {
            "phase": engine.phase,
            "model": self._model,
            "version": kvjax.__version__,
            "max_model_len": engine.max_model_len,
            "compression": self._compression,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "slots": [
                {"state": slot.state, "tokens": slot.tokens, "progress": round(slot.progress, 3)}
                for slot in stats.slots
            ],
            "waiting": stats.waiting,
            "running": stats.running,
            "suspended": stats.suspended,
            "generated_tokens": stats.generated_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "tokens_per_second": _rate(samples[-RATE_WINDOW:][0], samples[-1]),
            "ttft_ms": {"p50": self._first_token_ms(0.50), "p95": self._first_token_ms(0.95)},
            "requests": self._metrics.requests_by_outcome(),
            "compiles_after_warmup": stats.compiles_after_warmup,
            "store": [_tier(name, tier) for name, tier in engine.store_stats().items()],
            "history": [
                {"tokens_per_second": _rate(a, b), "running": b.running, "waiting": b.waiting}
                for a, b in zip(self._samples, list(self._samples)[1:], strict=False)
            ],
        }

    def _sample(self) -> RateSample:
        stats = self._engine.stats()
        return RateSample(time.monotonic(), stats.generated_tokens, stats.running, stats.waiting)

    def _first_token_ms(self, quantile: float) -> float | None:
        """The quantile of recent requests in milliseconds, None before the first."""
        if not self._first_tokens:
            return None
        if len(self._first_tokens) == 1:
            return round(1000 * self._first_tokens[0], 1)
        cuts = statistics.quantiles(self._first_tokens, n=100, method="inclusive")
        return round(1000 * cuts[round(100 * quantile) - 1], 1)


def _compression(caches: CacheConfigProtocol) -> dict[str, Any]:
    """What the views do with a prompt as long as the context."""
    layout = caches.layout
    context = layout.max_model_len
    full = caches.full_bytes(context)
    return {
        "method": layout.method,
        "token_budget": layout.token_budget,
        "headroom": layout.headroom,
        "retained_tokens": [plan.retained(context) for plan in caches.plans],
        "retained_share": round(caches.retained_bytes(context) / full, 4),
        "read_share": round(caches.read_bytes(context) / full, 4),
    }


def _tier(name: str, tier: TierStats) -> dict[str, Any]:
    return {
        "tier": name,
        "blocks": tier.blocks,
        "used_bytes": tier.used_bytes,
        "capacity_bytes": tier.capacity_bytes,
        "hit_tokens": BLOCK_TOKENS * tier.hits,
        "written_blocks": tier.written,
        "errors": sum(tier.errors.values()),
        "breaker": tier.breaker,
    }


def _rate(before: RateSample, after: RateSample) -> float:
    seconds = after.time - before.time
    return round((after.generated - before.generated) / seconds, 1) if seconds > 0 else 0.0
