"""The memory of a 16k-token prefill and of decode: predicted from shapes, and measured.

    python -m benchmarks.memory [--tokens 16384] [--slots 4] [--output benchmarks/results/NAME.json]

The model is that of `benchmarks.foundation`. "Predicted" is what an engine plans with before it reads a weight.
"Arrays" are the bytes of the arrays alive while a prompt is between two chunks. "XLA" is what each compiled step says
of itself: its temporaries, and how many bytes of its outputs are its inputs', updated in place. "Process" is how far
the resident memory rises while the steps run.
"""

import argparse
import pathlib
import re

import jax
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
from kvjax.engine.request import SamplingParams
from kvjax.store.sizes import show_size


def steps() -> dict[str, dict[str, int]]:
    """Of each compiled step the shape of which is largest: bytes of temporaries, of outputs, and of those in place."""
    largest: dict[str, dict[str, int]] = {}
    for executable in jax.devices()[0].client.live_executables():
        name = executable.hlo_modules()[0].name.removeprefix("jit_")
        memory = executable.get_compiled_memory_stats()
        row = {
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "in place": memory.alias_size_in_bytes,
        }
        if name in ("prefill_layer", "install", "first_token", "decode", "score"):
            largest[name] = max(largest.get(name, row), row, key=lambda each: each["outputs"])
    return largest


def largest_squares(tokens: int) -> list[str]:
    """Arrays of any compiled step with two axes as long as the prompt."""
    shapes: set[str] = set()
    for executable in jax.devices()[0].client.live_executables():
        shapes |= set(re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", executable.hlo_modules()[0].to_string()))
    return [shape for shape in shapes if sum(int(size) >= tokens for size in shape.split(",")) > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    config = make_model(options.tokens)
    layout = ResolvedConfig.resolve(EngineConfig(max_num_seqs=options.slots), options.tokens, jax.default_backend())
    caches = CacheConfig.declare(config, layout)
    predicted = plan(caches)

    runner = Runner(models.random(config, jax.random.key(0)), caches)
    runner.warm_up()
    idle = resident(peak=False)
    forget_peak()
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, options.tokens - 64).astype(np.int32)
    prefill = runner.begin(prompt, slot=0)
    most_alive = alive()
    while not prefill.done:
        runner.advance(prefill)
        most_alive = max(most_alive, alive())
        jax.block_until_ready(prefill.hidden)
    sampler = SamplerState.of(SamplingParams(), prompt, (), 0, runner.vocab_size)
    runner.finish(prefill, sampler, limit=64)
    prefill_rise = resident(peak=True) - idle
    del prefill
    forget_peak()
    holders = np.zeros(options.slots, np.bool_)
    holders[0] = True
    for _ in range(8):
        emitted = runner.decode(holders, layout.decode_steps).emitted
    jax.block_until_ready(emitted)
    decode_rise = resident(peak=True) - idle

    chunk, dtype = layout.prefill_chunk_size, layout.dtype
    print(f"{options.tokens:,} tokens of context, {options.slots} slots, chunks of {chunk}, {dtype}")
    for purpose, size in predicted.items():
        print(f"  predicted  {purpose:<14} {show_size(size):>10}")
    kept = sum(predicted.values()) - predicted["temporaries"]
    print(f"  arrays     predicted {show_size(kept)}, alive during prefill {show_size(most_alive)}")
    measured = steps()
    for name, row in measured.items():
        print(
            f"  XLA        {name:<14} {show_size(row['temporaries']):>10} of temporaries; "
            f"{show_size(row['in place'])} of {show_size(row['outputs'])} of outputs in place"
        )
    squares = largest_squares(options.tokens)
    print(f"  arrays with two axes of {options.tokens:,} or more: {', '.join(squares) or 'none'}")
    print(f"  process    prefill rises {show_size(prefill_rise)}, decode {show_size(decode_rise)} above an idle engine")
    if options.output:
        rows = [
            {"predicted": predicted, "alive": most_alive, "steps": measured, "squares": squares},
            {"process_rise": {"prefill": prefill_rise, "decode": decode_rise}},
        ]
        command = f"python -m benchmarks.memory --tokens {options.tokens} --slots {options.slots}"
        write_report(options.output, command, rows, ["jax", "jaxlib"])


if __name__ == "__main__":
    main()
