"""Prefill: one chunk through a layer, and the peak of the device's memory in prefill and decode.

Two parts of `benchmarks.device`. Prefill is timed at the beginning and at the end of a long prompt. Memory is that of
the engine's own runner: it meets every shape of a prompt as long as the context, one chunk for each group of layers,
and a decode step. What a device counts as its peak goes back to the process's beginning: parts that take more memory
come after, and where one came before all the same, the row says so.
"""

import functools
from typing import Any

import jax
import numpy as np

from benchmarks.device.clock import clock
from benchmarks.device.model import CALL, FULL, unfit
from benchmarks.device.point import XLA, Guess, Point
from benchmarks.device.rig import Rig, noise
from kvjax import cache
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import plan
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.sampling import SamplerState
from kvjax.engine.request import SamplingParams
from kvjax.pallas.dispatch import REFERENCE
from kvjax.plan.roofline import prefill_seconds
from kvjax.store.sizes import show_size

PART, MEMORY = "prefill", "memory"
LAYERS = 4  # are timed in one go, all of them alike
PASSES = 4  # of XLA over the float32 scores of a block, which a kernel keeps to itself


def points(rig: Rig) -> list[Point]:
    """The first chunk and the last one of a prompt as long as the context."""
    context = max(rig.contexts)
    caches = rig.caches(1, context, None)
    last = context // caches.layout.prefill_chunk_size - 1
    least = prefill_seconds(caches, rig.device, last + 1)
    return [
        Point(
            f"{PART}/chunk {chunk + 1} of {last + 1} {name}",
            PART,
            {"implementation": name, "chunk": chunk, "tokens": caches.layout.prefill_chunk_size, "context": context},
            _predicted(rig, name, caches.layout.prefill_chunk_size, chunk, least[chunk]),
            functools.partial(_measure, rig, caches, name, chunk),
            operations=least[chunk] * rig.device.flops,
            order=0 if chunk else 1,
        )
        for chunk in (0, last)
        for name in rig.implementations
    ]


def _predicted(rig: Rig, name: str, size: int, chunk: int, least: float) -> float:
    """The arithmetic of the roofline at the share of it that products reach, and what scores cost that are stored."""
    model, stored = rig.model, 0.0
    if name == REFERENCE:
        stored = 4.0 * PASSES * model.num_layers * model.num_heads * size * (chunk + 1) * size
    arithmetic = Guess(rig.device)(0, 20 * model.num_layers, least * rig.device.flops)
    return arithmetic + Guess(rig.device, XLA)(stored, 0) + CALL


def _measure(rig: Rig, caches: CacheConfig, name: str, chunk: int) -> dict[str, Any]:
    """Seconds of one chunk through all layers, by those of a few."""
    weights, kind, size = rig.weights, rig.kinds(name)[0], caches.layout.prefill_chunk_size
    longest = caches.layout.buckets[-1]
    workspace = {
        name: noise(spec.shape, spec.dtype, 1) for name, spec in cache.named(caches.workspace(longest)).items()
    }
    held = [
        noise((longest, rig.model.width), rig.dtype, 0),
        cache.unnamed(workspace, caches.workspace(longest)),
    ]
    start, length = np.int32(chunk * size), np.int32(longest)
    count = min(LAYERS, rig.model.num_layers)

    def run() -> Any:
        for leaves in weights.leaves[:count]:
            held[:] = steps.prefill_layer(kind, size, leaves, *held, start, length)
        return held

    timed = clock(run, rig.rounds)
    times = {key: timed[key] * rig.model.num_layers / count for key in ("seconds", "low", "high")}
    return {**timed, **times, "layers_timed": count, "tokens_per_second": size / times["seconds"]}


def memory_points(rig: Rig) -> list[Point]:
    """Peak memory with RocketKV and with the full cache; the smaller comes first."""
    batch, context = rig.headline
    if not rig.quick and context > 98_304 >= min(rig.contexts):
        context = max(each for each in rig.contexts if each <= 98_304)  # where a full cache of 8 still fits
    budget = 512 if 512 in rig.budgets else rig.budgets[0]
    rows = []
    for kept in (budget, None):
        caches = rig.caches(batch, context, kept)
        needed, reason = plan(caches), unfit(rig, caches)
        total = sum(needed.values())
        if reason is None and not rig.quick and total > rig.memory:
            reason = f"a prefill beside it takes {show_size(total)}, and {show_size(rig.memory)} are there"
        method = FULL if kept is None else f"rocketkv {kept}"
        rows.append(
            Point(
                f"{MEMORY}/{method} {batch}x{context}",
                MEMORY,
                {"arm": method, "batch": batch, "context": context, "predicted_bytes": total, "parts": needed},
                0.0,
                functools.partial(_peak, rig, caches),
                unfit=reason,
                order=0,
            )
        )
    return rows


def _peak(rig: Rig, caches: CacheConfig) -> dict[str, Any]:
    def peak() -> int | None:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    jax.block_until_ready(rig.weights.leaves)
    before = peak()
    runner = Runner(rig.decoder, caches)
    prefill = runner.begin(np.full(caches.layout.max_model_len, 5, np.int32), slot=0)
    prefill.length = prefill.chunk_size  # one chunk of each group meets every shape
    prefill.prompt = prefill.prompt[: prefill.length]
    while not prefill.done:
        runner.advance(prefill)
    sampler = SamplerState.of(SamplingParams(), prefill.prompt, (), 0, runner.vocab_size)
    jax.block_until_ready(runner.finish(prefill, sampler, limit=8))
    alone = np.arange(caches.layout.max_num_seqs) == 0
    jax.block_until_ready(runner.decode(alone, caches.layout.decode_steps).emitted)
    alive = sum(array.nbytes for array in jax.live_arrays())
    after = peak()
    runner.free()
    peaks: dict[str, Any] = {"alive": alive, "peak": after}
    if after is None:
        return peaks | {"note": "this device does not count its peak: alive are the arrays after a decode step"}
    if after == before:
        return peaks | {"peak": None, "note": f"the process took {show_size(after)} before: run --parts memory alone"}
    return peaks
