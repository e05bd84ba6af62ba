"""Decoding over compressed views: how fast, how much of what the bytes promise, and in how much memory.

    python -m benchmarks.views [--contexts 4096 16384 65536] [--budgets 256 1024] [--rounds 3] [--output FILE.json]

The model is that of `benchmarks.foundation`, with random weights. Views are filled with random keys and values, for a
decode step does the same work whatever they are, and a prefill of 65,536 tokens takes minutes here; the memory of a
prefill is that of a real one, at `--prefill` tokens. Arms take turns in every round. "Bytes" is the ratio of what a
step has to read: weights and full cache, over weights and what the method reads.
"""

import argparse
import dataclasses
import itertools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.process_memory import alive, forget_peak, resident
from benchmarks.common.random_model import make_model
from benchmarks.common.report import write_report
from kvjax import models
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import plan
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.sampling import SamplerState
from kvjax.engine.device.steps import DecodeState
from kvjax.engine.request import SamplingParams
from kvjax.store.sizes import show_size

ROOM = 128
STEPS = 16  # decode steps of a dispatch; two are timed


def caches(context: int, batch: int, method: str, budget: int | None) -> CacheConfig:
    config = EngineConfig(
        max_model_len=context, max_num_seqs=batch, method=method, token_budget=budget, headroom=ROOM, decode_steps=STEPS
    )
    return CacheConfig.declare(make_model(context), ResolvedConfig.resolve(config, context, jax.default_backend()))


def fill(runner: Runner, length: int) -> None:
    """Every slot decodes after `length` tokens, of which its views hold what they keep."""
    views = []
    for layer, view in zip(runner.caches.plans, runner.views, strict=True):
        held = layer.retained(length)
        k, v = (jax.random.normal(jax.random.key(seed), view.k.shape) for seed in range(2))
        order = jnp.arange(view.k.shape[2])
        positions = jnp.where(order < held, order, -1)
        view.k.delete(), view.v.delete()
        limits = None
        if view.limits is not None:
            limits = jax.tree.map(lambda every, own: jnp.full_like(every, own), view.limits, layer.limits())
        view = dataclasses.replace(
            view,
            k=k,
            v=v,
            positions=jnp.broadcast_to(positions, view.positions.shape),
            used=jnp.full_like(view.used, held),
            bounds=None if view.bounds is None else jnp.ones_like(view.bounds),
            limits=limits,
        )
        views.append(view)
    runner.views = tuple(views)
    state: DecodeState = runner.state
    full = lambda x, value: jnp.full_like(x, value)  # noqa: E731
    runner.state = DecodeState(
        token=full(state.token, 5),
        position=full(state.position, length),
        generated=full(state.generated, 0),
        limit=full(state.limit, 1 << 20),
        active=full(state.active, True),
        sampler=state.sampler,
    )
    for slot in range(runner.layout.max_num_seqs):
        runner.occupancy.written(slot, length, runner.caches.plans)


def decode_seconds(runner: Runner, length: int) -> float:
    """Of one step over all slots."""
    everyone = np.ones(runner.layout.max_num_seqs, np.bool_)
    fill(runner, length)
    jax.block_until_ready(runner.decode(everyone, STEPS).emitted)
    began = time.perf_counter()
    for _ in range(2):
        out = runner.decode(everyone, STEPS)
    emitted = np.asarray(out.emitted)
    seconds = time.perf_counter() - began
    assert emitted.all(), "a slot has stopped"
    return seconds / (2 * STEPS)


def decode_rows(contexts: list[int], budgets: list[int], batches: list[int], method: str, rounds: int) -> list[dict]:
    rows: list[dict[str, Any]] = []
    weights = plan(caches(contexts[0], 1, "full", None))["weights"]
    for context, batch in itertools.product(contexts, batches):
        length = context - 4 * STEPS
        arms = {"full": caches(context, batch, "full", None)}
        arms |= {f"{method} {budget}": caches(context, batch, method, budget) for budget in budgets}
        runners = {name: Runner(models.random(arm.model, jax.random.key(0)), arm) for name, arm in arms.items()}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(rounds + 1):
            for name, runner in runners.items():
                value = decode_seconds(runner, length)
                if turn:  # the first one compiles
                    seconds[name].append(value)
        read = {name: weights + batch * arm.read_bytes(length) for name, arm in arms.items()}
        for name, arm in arms.items():
            speedup = statistics.median(a / b for a, b in zip(seconds["full"], seconds[name], strict=True))
            row = {
                "context": context,
                "batch": batch,
                "arm": name,
                "tokens_per_second": batch / statistics.median(seconds[name]),
                "speedup": speedup,
                "bytes_ratio": read["full"] / read[name],
                "kept_bytes": arm.retained_bytes(length),
                "full_bytes": arm.full_bytes(length),
                "read_bytes": arm.read_bytes(length),
            }
            rows.append(row)
            print(
                f"{context:7,} x {batch}  {name:<16} {row['tokens_per_second']:8.1f} tok/s   {speedup:5.2f}x full"
                f"   bytes {row['bytes_ratio']:5.2f}x   {speedup / row['bytes_ratio']:5.0%} of that"
                f"   keeps {show_size(row['kept_bytes'])} of {show_size(row['full_bytes'])}",
                flush=True,
            )
        for runner in runners.values():
            runner.free()
    return rows


def memory_row(context: int, method: str, budget: int | None) -> dict[str, Any]:
    """Bytes beyond the weights while one prompt is prefilled, and while it decodes."""
    arm = caches(context, 1, method if budget else "full", budget)
    runner = Runner(models.random(arm.model, jax.random.key(0)), arm)
    runner.warm_up()
    weights = plan(arm)["weights"]
    idle = resident(peak=False)
    forget_peak()
    prompt = np.random.default_rng(0).integers(3, 32_000, context - 64).astype(np.int32)
    prefill, most = runner.begin(prompt, slot=0), 0
    while not prefill.done:
        runner.advance(prefill)
        most = max(most, alive() - weights)
        jax.block_until_ready(prefill.hidden)
    sampler = SamplerState.of(SamplingParams(), prompt, (), 0, runner.vocab_size)
    runner.finish(prefill, sampler, limit=64)
    rise = resident(peak=True) - idle
    del prefill
    name = "full" if budget is None else f"{method} {budget}"
    kept, full = arm.retained_bytes(len(prompt)), arm.full_bytes(len(prompt))
    print(
        f"{context:7,}      {name:<16} prefill holds {show_size(most)} beside the weights, the process rises "
        f"{show_size(rise)}; after it {show_size(kept)} of {show_size(full)} are kept, 1/{full / kept:.1f}",
        flush=True,
    )
    runner.free()
    return {"context": context, "arm": name, "arrays": most, "rise": rise, "kept_bytes": kept, "full_bytes": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16_384, 65_536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--method", default="rocketkv")
    parser.add_argument("--prefill", type=int, default=16_384, help="tokens of the prompt whose memory is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    rows = decode_rows(options.contexts, options.budgets, options.batches, options.method, options.rounds)
    rows += [memory_row(options.prefill, options.method, budget) for budget in (None, *options.budgets)]
    if options.output:
        given = " ".join(
            f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
            for name, value in vars(options).items()
            if name != "output"
        )
        write_report(options.output, f"python -m benchmarks.views {given}", rows, ["jax", "jaxlib"])


if __name__ == "__main__":
    main()
