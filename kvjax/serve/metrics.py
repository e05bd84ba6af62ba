"""Prometheus metrics under `kvjax:` with vLLM's suffixes and units, so that its dashboards need one edit.

Counters and gauges of the engine are read when scraped, from its own snapshot; latencies are observed as
requests end. All of them exist, at zero, from the start. No label holds anything a user wrote.
"""

from collections.abc import Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvjax.engine.request import Finish, Timing
from kvjax.serve.protocol import EngineProtocol
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.tier import Reason

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG_SECONDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))

REASONS = ("corrupt", "verify", "parent", "no place", *get_args(Reason))
FINISHED_REASONS = (Finish.STOP, Finish.LENGTH, "abort", Finish.ERROR)


class EngineCollector(Collector):
    """The engine's snapshot as metric families."""

    def __init__(self, engine: EngineProtocol, model_name: str) -> None:
        self.engine, self.labels = engine, {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        gauges = (
            ("num_requests_running", "Requests prefilling or decoding.", stats.running),
            ("num_requests_waiting", "Requests waiting for a slot.", stats.waiting),
            (
                "num_requests_suspended",
                "Conversations of before a restart that nobody has asked for again.",
                stats.suspended,
            ),
            ("num_slots", "Requests that can run at once.", len(stats.slots)),
            ("ready", "1 when the server takes requests.", int(self.engine.phase == "ready")),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens whose KV was not computed again.", stats.cached_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("prefill_units", "Chunks of prompts pushed through a group of layers.", stats.prefill_units),
            ("decode_steps", "Decode steps over all slots.", stats.decode_steps),
            ("engine_busy_seconds", "Time the engine had work.", stats.busy_seconds),
            ("compiles_after_warmup", "Compilations once ready; 0 is healthy.", stats.compiles_after_warmup),
        )
        for families, kind in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, meaning, value in families:
                family = kind(f"kvjax:{name}", meaning, labels=tuple(self.labels))
                family.add_metric(tuple(self.labels.values()), value)
                yield family
        yield from self._store()

    def _store(self) -> Iterator[Metric]:
        """One sample a tier of the KV store."""
        tiers = self.engine.store_stats()
        gauges = (
            ("store_blocks", "Blocks of 256 tokens in a tier.", lambda tier: tier.blocks),
            ("store_used_bytes", "Bytes in a tier.", lambda tier: tier.used_bytes),
            (
                "store_capacity_bytes",
                "Bytes that a tier may hold; 0: it does not say.",
                lambda t: t.capacity_bytes,
            ),
            (
                "store_breaker_open",
                "1 while a tier that failed is left alone.",
                lambda t: int(t.breaker == "open"),
            ),
        )
        counters = (
            ("store_hit_tokens", "Prompt tokens whose KV a tier had.", lambda tier: BLOCK_TOKENS * tier.hits),
            ("store_loaded_bytes", "Bytes read from a tier to host memory.", lambda tier: tier.loaded_bytes),
            ("store_load_seconds", "Seconds of those reads, of all threads together.", lambda tier: tier.load_seconds),
            ("store_written_blocks", "Blocks written to a tier.", lambda tier: tier.written),
            ("store_checked_layers", "Layers of found blocks that were computed again.", lambda tier: tier.checked),
            ("store_evicted_blocks", "Blocks that left a tier for others.", lambda tier: tier.evictions),
        )
        labels = (*self.labels, "tier")
        for families, kind in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, meaning, value in families:
                family = kind(f"kvjax:{name}", meaning, labels=labels)
                for tier, stats in tiers.items():
                    family.add_metric((*self.labels.values(), tier), value(stats))
                yield family
        errors = CounterMetricFamily("kvjax:store_errors", "What a tier did wrong.", labels=(*labels, "reason"))
        for tier, stats in tiers.items():
            for reason in REASONS:
                errors.add_metric((*self.labels.values(), tier, reason), stats.errors.get(reason, 0))
        yield errors


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, engine: EngineProtocol, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))
        self._model = model_name
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_SECONDS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG_SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "Waiting for a slot.", _LONG_SECONDS)
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From the slot to the first token.", _LONG_SECONDS
        )
        self.decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _LONG_SECONDS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_length = self._histogram("request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self._ended = self._counter("request_success", "Ended requests by reason.", "finished_reason")
        self._source = self._counter("prompt_tokens_by_source", "Prompt tokens by KV origin.", "source")
        for reason in FINISHED_REASONS:
            self._ended.labels(self._model, reason)
        self._source.labels(self._model, "computed")
        self.requests = Counter(
            "kvjax:http_requests",
            "HTTP answers; status 499 is a client that left.",
            ("path", "method", "status"),
            registry=self.registry,
        )

    def _histogram(self, name: str, meaning: str, buckets: tuple[int | float, ...]) -> Histogram:
        family = Histogram(f"kvjax:{name}", meaning, ("model_name",), buckets=buckets, registry=self.registry)
        return family.labels(self._model)

    def _counter(self, name: str, meaning: str, label: str) -> Counter:
        return Counter(f"kvjax:{name}", meaning, ("model_name", label), registry=self.registry)

    def tokens(self, seconds: float, count: int) -> None:
        """`count` tokens arrived together, `seconds` after the ones before them."""
        for _ in range(count):
            self.inter_token_latency.observe(seconds / count)

    def ended(self, reason: str, *, prompt_tokens: int = 0, generated: int = 0, timing: Timing | None = None) -> None:
        """One stream of the engine ended; `reason` is one of `FINISHED_REASONS`."""
        self._ended.labels(self._model, reason).inc()
        if timing is None:
            return
        self.prompt_length.observe(prompt_tokens)
        self.generation_length.observe(generated)
        self.e2e.observe(timing.finished - timing.arrived)
        self.queue.observe(timing.scheduled - timing.arrived)
        self.prefill.observe(timing.first_token - timing.scheduled)
        if generated:
            self.time_to_first_token.observe(timing.first_token - timing.arrived)
            self.decode.observe(timing.finished - timing.first_token)
        for source, tokens in timing.prefix.items():
            self._source.labels(self._model, source).inc(tokens)

    def requests_by_outcome(self) -> dict[str, int]:
        """Ended requests as the page shows them: the same counts by fewer reasons."""
        outcomes: dict[str, int] = {"finished": 0, "cancelled": 0, "failed": 0}
        for family in self._ended.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    reason = sample.labels["finished_reason"]
                    outcome = {"abort": "cancelled", "error": "failed"}.get(reason, "finished")
                    outcomes[outcome] += int(sample.value)
        return outcomes

    def exposition(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self.registry)
