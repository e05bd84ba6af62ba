"""kvjax against HF transformers on torch, side by side: the same random weights, the same process, turn by turn.

    python -m benchmarks.foundation [--rounds 5] [--output benchmarks/results/NAME.json]

The model is a Llama of 8 layers, width 512, vocabulary 32,000, float32, with random weights. Both arms are driven by
their public batch call with greedy decoding; decode speed is the time of 65 tokens less that of 1. Arms alternate in
every round, so that whatever else the machine does meets both; the ratio is the median of the rounds' ratios.
"""

import argparse
import gc
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.common.random_model import VOCABULARY, write_tokenizer
from benchmarks.common.report import write_report

DECODED = 64
PREFILL_LENGTHS = (1024, 4096)
DECODE_BATCHES = (1, 8)
DECODE_CONTEXT = 1024

Arm = Callable[[list[list[int]], int], None]


def write_model(path: str, max_position: int = 5120) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max_position,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    write_tokenizer(path)


def torch_arm(path: str) -> Arm:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], count: int) -> None:
        with torch.no_grad():
            out = model.generate(torch.tensor(prompts), max_new_tokens=count, do_sample=False)
        assert out.shape[1] == len(prompts[0]) + count

    return generate


def kvjax_arm(path: str, slots: int) -> Arm:
    from kvjax.engine import Engine, EngineConfig, SamplingParams

    engine = Engine.from_pretrained(path, EngineConfig(max_num_seqs=slots, decode_steps=16))
    engine.start()

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        completions = engine.generate(prompts, params, progress=False)
        assert all(len(completion.tokens) == count for completion in completions)

    return generate


def seconds(arm: Arm, prompts: list[list[int]], count: int) -> float:
    began = time.perf_counter()
    arm(prompts, count)
    return time.perf_counter() - began


def measure(name: str, arms: dict[str, Arm], rate: Callable[[Arm], float], rounds: int) -> dict:
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for index in range(rounds + 1):
        for arm, generate in arms.items():
            value = rate(generate)
            if index:  # the first round warms caches up
                rates[arm].append(value)
    ratios = [kvjax_rate / torch_rate for kvjax_rate, torch_rate in zip(rates["kvjax"], rates["torch"], strict=True)]
    row = {"name": name, **{arm: statistics.median(values) for arm, values in rates.items()}}
    row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    print(
        f"{name:<28} torch {row['torch']:9,.0f} tok/s   kvjax {row['kvjax']:9,.0f} tok/s"
        f"   ratio {row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    random = np.random.default_rng(0)

    def prompts(batch: int, length: int) -> list[list[int]]:
        return random.integers(3, VOCABULARY, (batch, length)).tolist()

    rows = []
    with tempfile.TemporaryDirectory() as path:
        write_model(path)
        torch_generate = torch_arm(path)
        for batch in DECODE_BATCHES:
            arms = {"torch": torch_generate, "kvjax": kvjax_arm(path, slots=batch)}

            def decode_rate(arm: Arm, batch: int = batch) -> float:
                batch_prompts = prompts(batch, DECODE_CONTEXT)
                first = seconds(arm, batch_prompts, 1)
                return batch * DECODED / (seconds(arm, batch_prompts, DECODED + 1) - first)

            if batch == 1:
                for length in PREFILL_LENGTHS:
                    rate = lambda arm, length=length: length / seconds(arm, prompts(1, length), 1)  # noqa: E731
                    rows.append(measure(f"prefill {length}", arms, rate, options.rounds))
            rows.append(measure(f"decode batch {batch}, {DECODE_CONTEXT}", arms, decode_rate, options.rounds))
            del arms
            gc.collect()
    if options.output:
        command = f"python -m benchmarks.foundation --rounds {options.rounds}"
        write_report(options.output, command, rows, ["jax", "jaxlib", "torch", "transformers"])


if __name__ == "__main__":
    main()
