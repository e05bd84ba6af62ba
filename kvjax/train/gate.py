"""The gate before weights are published: do they retrieve, and does another program read the same model?

Hugging Face transformers loads the very files that ship and decodes greedily; the answers are scored, and
every token is compared with the one that kvjax's own decoder finds likeliest at that place.
"""

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.eval.metrics import string_match_all, wilson_interval
from kvjax.eval.tasks import TASKS, find_task
from kvjax.eval.tasks_sample import Sample
from kvjax.models import load
from kvjax.train.corpus import standard_library

# Far from the seeds of any other use of the tasks.
FIRST_SEED = 1_000_000
PASS = 0.95


@dataclass(frozen=True)
class Figure:
    """One measured cell.

    Attributes:
        accuracy: mean share of the answers found, full cache, greedy.
        agreement: share of generated tokens on which both programs agree, over the first `compared` samples.
    """

    task: str
    form: str
    length: int
    samples: int
    accuracy: float
    compared: int
    agreement: float


class Gate:
    """A model folder, loaded twice: by transformers on torch and by kvjax.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.other: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", use_safetensors=True)
        graph, self.params = nnx.split(load(folder))
        self.logits = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text)["input_ids"])

    def ids(self, sample: Sample, form: str) -> list[int]:
        """The prompt's tokens: a 'completion' ends in the answer's beginning, a 'chat' in its role."""
        if form == "completion":
            return self.tokenizer(sample.prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(sample.messages, add_generation_prompt=True, return_dict=False)

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """Transformers' greedy continuation."""
        inputs = self.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
        out = self.other.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, len(ids) :].tolist()

    def agreement(self, ids: list[int], new: list[int], length: int) -> float:
        """Share of `new` that kvjax's decoder finds likeliest after all tokens before."""
        size = max(length, len(ids) + len(new))
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(ids) + len(new)] = ids + new
        best = np.asarray(jnp.argmax(self.logits(self.params, jnp.asarray(padded))[0], axis=-1))
        return float(np.mean(best[len(ids) - 1 : len(ids) + len(new) - 1] == np.array(new)))

    def measure(self, task: str, length: int, samples: int, form: str, compared: int) -> Figure:
        """Scores `samples` held-out samples of one task at one length in tokens."""
        scores, agreements = [], []
        for index in range(samples):
            # a chat's own tokens, and its answer's beginning, need room as well
            room = length - (16 if form == "chat" else 0)
            sample = find_task(task).sample(length=room, seed=FIRST_SEED + index, count=self.count)
            ids = self.ids(sample, form)
            new = self.generate(ids, min(sample.max_new_tokens, length - len(ids)))
            scores.append(string_match_all(self.tokenizer.decode(new, skip_special_tokens=True), sample.answers))
            if index < compared:
                agreements.append(self.agreement(ids, new, length))
        mean, agreement = float(np.mean(scores)), float(np.mean(agreements))
        return Figure(task, form, length, samples, mean, len(agreements), agreement)

    def python(self, length: int, samples: int) -> tuple[float, float, float]:
        """Nats a token, bits a byte and share of tokens predicted, on packages that training held out."""
        text = "".join(text for _, text in standard_library(held_out=True))
        ids = self.tokenizer(text)["input_ids"]
        losses, hits, size = [], [], 0
        for start in np.linspace(0, len(ids) - length - 1, samples).astype(int):
            tokens = np.array(ids[start : start + length], np.int32)
            logits = np.asarray(jax.nn.log_softmax(self.logits(self.params, jnp.asarray(tokens[None]))[0, :-1]))
            losses += (-logits[np.arange(length - 1), tokens[1:]]).tolist()
            hits += (logits.argmax(-1) == tokens[1:]).tolist()
            size += len(self.tokenizer.decode(tokens[1:]).encode())
        return float(np.mean(losses)), float(np.sum(losses) / np.log(2) / size), float(np.mean(hits))


def main(argv: list[str] | None = None) -> None:
    """Measures a model folder with the full cache; ends with status 1 if the needle tasks do not pass."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.train.gate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of prompt and answer")
    parser.add_argument("--samples", type=int, default=50, help="of each task at each length")
    parser.add_argument("--compared", type=int, default=10, help="samples of each whose tokens are compared")
    parser.add_argument("--tasks", nargs="+", default=[name for name in TASKS if name.startswith("mini/")])
    parser.add_argument("--forms", nargs="+", choices=("completion", "chat"), default=["completion", "chat"])
    parser.add_argument(
        "--must-pass",
        nargs="*",
        default=["mini/niah_single_1", "mini/niah_single_2", "mini/niah_multikey_1"],
        help=f"tasks that must reach {PASS:.0%} at every length",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    gate = Gate(args.model)
    print("full cache, greedy, held-out seeds; accuracy with its 95% interval; agreement with transformers")
    found = []
    cells = itertools.product(args.lengths, args.forms, args.tasks)
    for length, form, task in cells:
        figure = gate.measure(task, length, args.samples, form, args.compared)
        found.append(figure)
        low, high = wilson_interval(figure.accuracy, figure.samples)
        print(
            f"{figure.length:6d}  {figure.form:10s}  {figure.task:20s} {figure.accuracy:7.1%} "
            f"[{low:6.1%}, {high:6.1%}]  n={figure.samples}  agreement {figure.agreement:.3f} n={figure.compared}",
            flush=True,
        )
    nats, bits, hits = gate.python(min(args.lengths[-1], 1024), 40)
    print(f"held-out Python: {nats:.3f} nats a token, {bits:.3f} bits a byte, {hits:.1%} of tokens predicted")
    if args.json:
        args.json.write_text(json.dumps([asdict(figure) for figure in found], indent=1) + "\n")
    failed = [f"{f.task} {f.form} at {f.length}" for f in found if f.task in args.must_pass and f.accuracy < PASS]
    print(f"gate: {'fails: ' + ', '.join(failed) if failed else 'passes'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
