"""From host memory into the workspaces: how fast the engine's way is, against a plain copy to the device.

A part of `benchmarks.store`. The plain copy is `device_put` of as many bytes, in whole groups or in the same chunks,
whichever is faster. "Gathered" is the engine's part on the host alone: views of the blocks in their buffers, layer by
layer, of which nothing is copied. On a CPU there is no bus: everything here is a copy in memory.
"""

import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.store_engine import Plan, engine_on, in_turns, prefix_of, prompt, ttft
from kvjax.engine.device.prefill import Prefill
from kvjax.engine.device.runner import Runner
from kvjax.engine.kv.prefix_cache import PrefixCache, StoredPrefix
from kvjax.engine.kv.transfers import PromptTransfer
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS


def device(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Restoring a prompt's blocks into the workspaces against `device_put` of the same bytes, in turns."""
    length = max(plan.lengths)
    store = StoreConfig(host_cache_size=plan.host, prefetch_policy="wait_complete")
    with engine_on(plan.model, length + 64, store) as engine:
        tokens, runner, prefix = prompt(length, seed=3), engine._runner, prefix_of(engine)
        assert runner is not None
        ttft(engine, tokens)
        prefill, stored = begin(runner, prefix, np.asarray(tokens, np.int32))
        try:
            counts = runner.load_counts(prefill.bucket, BLOCK_TOKENS)
            groups = same_bytes(runner, prefix, stored)
            chunks = [
                np.array_split(array, 2 * len(group) * num_loads(stored.used_blocks, counts))
                for array, group in zip(groups, runner.groups, strict=True)
            ]

            def put_groups() -> None:
                for array in groups:  # no more on the device at once than a group has
                    jax.block_until_ready(jax.device_put(array))

            def put_chunks() -> None:
                for arrays in chunks:
                    jax.block_until_ready(jax.device_put(arrays))

            def gather() -> None:
                for layer in range(len(runner.caches.plans)):
                    for _ in prefix.load(stored, layer, counts):
                        pass

            arms = {
                "device_put groups": put_groups,
                "device_put chunks": put_chunks,
                "gathered": gather,
                "restored": lambda: restore(runner, prefix, prefill, stored),
            }
            rates = in_turns(arms, plan.rounds, sum(array.nbytes for array in groups))
        finally:
            prefix.release(stored)
    plain = max(rates["device_put groups"], rates["device_put chunks"])
    share = rates["restored"] / plain
    print(
        f"device    {stored.used:,} tokens: device_put {plain:.2f} GB/s, restored "
        f"{rates['restored']:.2f} GB/s: {share:.2f} of it; gathered on the host at {rates['gathered']:.2f} GB/s"
    )
    return {"tokens": stored.used, "step": prefill.sizes[0], "gigabytes_per_second": rates, "share": share}


def begin(runner: Runner, prefix: PrefixCache, tokens: np.ndarray) -> tuple[Prefill, StoredPrefix]:
    """A prefill before its first step, and its blocks, which are all in host memory."""
    there = threading.Event()
    stored = prefix.lookup(tokens, "", there.set)
    if stored.ready_at and not there.wait(60.0):
        raise RuntimeError("the blocks did not come within 60 s")
    prefill = runner.begin(tokens, slot=0)
    prefill.reuse(prefix.claim(stored))
    return prefill, stored


def num_loads(blocks: int, counts: Sequence[int]) -> int:
    """How often a layer's blocks are given to the device, so many of `counts` at once."""
    loads = 0
    for count in counts:
        more, blocks = divmod(blocks, count)
        loads += more
    return loads


def restore(runner: Runner, prefix: PrefixCache, prefill: Prefill, stored: StoredPrefix) -> None:
    """Fills the workspaces of every group from the blocks, as a prefill does when it comes to the group."""
    transfer = PromptTransfer(runner, prefill, prefix, stored)
    for group in range(prefill.num_groups):
        prefill.group = group
        transfer.before_unit()
        jax.block_until_ready(runner.workspaces(prefill.bucket, group))


def same_bytes(runner: Runner, prefix: PrefixCache, stored: StoredPrefix) -> list[np.ndarray]:
    """As many bytes as all groups restore, an array a group.

    They, and the chunks of them, begin beside the alignment at which a CPU backend shares memory: `device_put` copies.
    """
    layer = 2 * prefix.store.layout.tensor_bytes * stored.used_blocks
    random = np.random.default_rng(0)
    arrays = []
    for group in runner.groups:
        raw = random.integers(0, 256, len(group) * layer + 128, np.uint8)
        first = (-raw.ctypes.data) % 64 + 4
        arrays.append(raw[first : first + len(group) * layer].view(np.float32))
    return arrays
