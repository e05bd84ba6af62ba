"""Warm prompts: TTFT of a prompt that comes again, and of one that goes on behind it, from host memory and from disk.

A part of `benchmarks.store`, on a model as it is served. The engine is restarted between host memory and disk.
"""

import pathlib
import statistics
from typing import Any

from benchmarks.store_engine import Plan, engine_on, forget_host, prompt, step_of, ttft
from kvjax import models
from kvjax.engine import Engine
from kvjax.store.config import StoreConfig

FURTHER = 64  # tokens that go on behind a prompt


def again(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """TTFT of identical prompts and of prompts that go on behind them, against computing them."""
    context = models.read_config(plan.served).max_position
    lengths = [length for length in plan.prompts if length + FURTHER < context]
    rows = [measure(plan, folder / str(length), length) for length in lengths]
    for length in set(plan.prompts) - set(lengths):
        print(f"again     {length:6,} tokens: more than the {context:,} of the model's context")
    return {"model": pathlib.Path(plan.served).name, "rows": rows}


def measure(plan: Plan, folder: pathlib.Path, length: int) -> dict[str, Any]:
    """One length: `rounds` prompts are computed, asked again, and asked again by another engine on the same folder."""
    store = StoreConfig(
        host_cache_size=plan.host, disk_cache=folder, disk_cache_size=64 << 30, prefetch_policy="wait_complete"
    )
    prompts = [prompt(length, seed=length + number, vocabulary=plan.vocabulary) for number in range(plan.rounds)]
    with engine_on(plan.served, length + 2 * FURTHER, store) as engine:
        cold = [ttft(engine, tokens) for tokens in prompts]
        host = [ttft(engine, tokens) for tokens in prompts]
        host_further = further(plan, engine, prompts)
        step = step_of(engine)
        engine.drain(60.0)  # tails go to the disk when they are used, and at the end
    with engine_on(plan.served, length + 2 * FURTHER, store) as engine:
        disk = [ttft(engine, tokens) for tokens in prompts]
        disk_further = further(plan, engine, prompts, from_disk=True)
    arms = {"cold": cold, "host": host, "host further": host_further, "disk": disk, "disk further": disk_further}
    seconds = {name: statistics.median(each for each, _ in arm) for name, arm in arms.items()}
    cached = {name: [count for _, count in arm] for name, arm in arms.items()}
    print(
        f"again     {length:6,} tokens: computed {seconds['cold']:.2f} s; again from host {seconds['host']:.3f} s, "
        f"from disk {seconds['disk']:.3f} s ({cached['disk'][-1]:,} tokens found); {FURTHER} tokens more from "
        f"host {seconds['host further']:.3f} s, from disk {seconds['disk further']:.3f} s "
        f"({cached['disk further'][-1]:,} found); hits are multiples of {step} tokens"
    )
    return {"tokens": length, "step": step, "seconds": seconds, "cached": cached}


def further(
    plan: Plan, engine: Engine, prompts: list[list[int]], *, from_disk: bool = False
) -> list[tuple[float, int]]:
    """TTFT of other tokens behind each prompt."""
    taken = []
    for number, tokens in enumerate(prompts):
        if from_disk:
            forget_host(engine)
        behind = prompt(FURTHER, seed=100 + number + 1000 * from_disk, vocabulary=plan.vocabulary)
        taken.append(ttft(engine, [*tokens, *behind]))
    return taken
