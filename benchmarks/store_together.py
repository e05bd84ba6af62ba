"""Prompts at once: equal ones, and ones with a common beginning, of which each token should be computed once.

A part of `benchmarks.store`, on a model as it is served: requests that wait look again when their turn comes, and use
what another one is still computing.
"""

import pathlib
import time
from typing import Any

from benchmarks.store_engine import ONE, Plan, engine_on, prompt, settle, step_of, ttft
from kvjax.engine import Engine
from kvjax.store.config import StoreConfig

LENGTH, COMMON = 1300, 1024  # tokens of a prompt, and of what some of them begin with
EQUAL, SHARING = 8, 32  # prompts
SLOTS = 4


def together(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Eight equal prompts, and 32 with a common beginning, each against one prompt alone."""
    store = StoreConfig(host_cache_size=plan.host, prefetch_policy="wait_complete")
    with engine_on(plan.served, LENGTH + 64, store, slots=SLOTS) as engine:
        ttft(engine, prompt(LENGTH, seed=1, vocabulary=plan.vocabulary))
        alone, _ = ttft(engine, prompt(LENGTH, seed=2, vocabulary=plan.vocabulary))
        equal = [prompt(LENGTH, seed=3, vocabulary=plan.vocabulary)] * EQUAL
        common = prompt(COMMON, seed=4, vocabulary=plan.vocabulary)
        sharing = [
            [*common, *prompt(LENGTH - COMMON, seed=10 + each, vocabulary=plan.vocabulary)] for each in range(SHARING)
        ]
        rows = [
            at_once(engine, f"{EQUAL} equal prompts", equal, alone),
            at_once(engine, f"{SHARING} with {COMMON:,} tokens in common", sharing, alone),
        ]
        step = step_of(engine)
    print(f"together  one prompt alone takes {alone:.2f} s; {SLOTS} slots; hits are multiples of {step} tokens")
    return {"model": pathlib.Path(plan.served).name, "alone_s": alone, "slots": SLOTS, "step": step, "rows": rows}


def at_once(engine: Engine, name: str, prompts: list[list[int]], alone: float) -> dict[str, Any]:
    """Seconds until all of them have a token, and what was computed for it."""
    began = time.perf_counter()
    answers = engine.generate(prompts, ONE, progress=False)
    seconds = time.perf_counter() - began
    settle(engine)
    cached = [answer.cached_tokens for answer in answers]
    total = sum(map(len, prompts))
    computed = total - sum(cached)
    print(
        f"together  {name}: {computed:,} of {total:,} tokens computed, {seconds:.2f} s, {seconds / alone:.1f} times "
        f"one alone; found by each {ranges(cached)}"
    )
    return {"name": name, "tokens": total, "computed": computed, "cached": cached, "seconds": seconds}


def ranges(counts: list[int]) -> str:
    """Equal numbers in a row once, with how many there are."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count:,}" if times == 1 else f"{times} x {count:,}" for count, times in runs)
