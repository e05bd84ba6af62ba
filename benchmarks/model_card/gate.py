"""The retrieval gate, which weights pass before they are published: needle tasks at every length and depth.

The engine generates greedily with the full cache. Hugging Face transformers loads the same files, continues a part
of the same prompts, and must generate the same tokens.
"""

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model_card.depth import at_depth
from benchmarks.model_card.figure import BARS, Figure
from benchmarks.model_card.gate_plot import plot
from kvjax.engine import Completion, Engine, EngineConfig, SamplingParams
from kvjax.eval.metrics import string_match_all, wilson_interval
from kvjax.eval.tasks import Sample, find_task
from kvjax.eval.tasks.needle import NeedleTask
from kvjax.models import read_config

# Far from the seeds of any other use of the tasks.
FIRST_SEED = 1_000_000
OTHERS = ("mini/niah_multivalue", "mini/niah_multiquery")
SLOTS = 8  # answers written side by side


def serving(folder: Path, length: int) -> Engine:
    """The engine of a model folder for sequences of `length` tokens, or of fewer if the model's context is shorter.

    With the full cache, and on every device in float32, as transformers is compared with.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
    """
    length = min(length, read_config(folder).max_position)
    config = EngineConfig(max_model_len=length, max_num_seqs=SLOTS, dtype="float32", method="full")
    return Engine.from_pretrained(folder, config)


class RetrievalGate:
    """A model folder in an engine that has started, and in transformers on torch, the reference."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder, self.engine = folder, engine
        self._reference: tuple[Any, Any] | None = None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.engine.tokenizer.encode(text))

    def ids(self, sample: Sample, form: str) -> list[int]:
        """The prompt's tokens: a 'completion' ends in the answer's beginning, a 'chat' in its role."""
        if form == "completion":
            return self.engine.tokenizer.encode(sample.prompt)
        return self.engine.tokenizer.apply_chat_template(sample.messages)

    def answers(self, prompts: list[list[int]], rooms: list[int]) -> list[Completion]:
        """The engine's greedy continuation of each prompt, at most as many tokens as it has room for."""
        params = [SamplingParams(max_tokens=room, temperature=0.0) for room in rooms]
        return self.engine.generate(prompts, params, progress=False)

    def reference(self, ids: list[int], new: int) -> list[int]:
        """Transformers' greedy continuation, without the token that ends it."""
        if self._reference is None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32", use_safetensors=True)
            self._reference = model, AutoTokenizer.from_pretrained(self.folder)
        model, tokenizer = self._reference
        inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return self.cut(out[0, len(ids) :].tolist())

    def cut(self, tokens: Iterable[int]) -> list[int]:
        """Generated tokens up to the first that ends a text."""
        ends = self.engine.model_config.eos_token_ids
        return list(itertools.takewhile(lambda token: token not in ends, tokens))

    def samples(self, task: str, length: int, form: str, depths: int, each: int) -> list[tuple[float | None, Sample]]:
        """`depths * each` held-out samples, with the depth of the needle where there is one needle to move.

        Raises:
            ValueError: the task does not fit into `length` tokens, or these do not fit into the model's context.
        """
        if length > self.engine.max_model_len:
            raise ValueError(f"{length} tokens do not fit the model's context of {self.engine.max_model_len}")
        # a chat's own tokens, and its answer's beginning, need room as well; so does a blank that a move adds
        room = length - (16 if form == "chat" else 0) - 2
        made = find_task(task)
        one = isinstance(made, NeedleTask) and made.values == made.queries == 1
        samples: list[tuple[float | None, Sample]] = []
        for index in range(depths * each):
            sample = made.sample(length=room, seed=FIRST_SEED + index, count=self.count)
            depth = (index % depths) / max(depths - 1, 1)
            samples.append((depth, at_depth(sample, depth)) if one else (None, sample))
        return samples

    def measure(self, task: str, length: int, form: str, *, depths: int, each: int, compared: int) -> Figure:
        """Scores one task at one length in tokens; raises what `samples` raises."""
        samples = self.samples(task, length, form, depths, each)
        prompts = [self.ids(sample, form) for _, sample in samples]
        if (longest := max(map(len, prompts))) >= length:
            raise ValueError(f"a prompt has {longest} tokens, which leaves no room for an answer in {length}")
        rooms = [
            min(sample.max_new_tokens, length - len(ids)) for (_, sample), ids in zip(samples, prompts, strict=True)
        ]
        replies = self.answers(prompts, rooms)
        scores = [
            string_match_all(reply.text, sample.answers) for (_, sample), reply in zip(samples, replies, strict=True)
        ]
        same: list[bool] = []
        for prompt, room, reply in list(zip(prompts, rooms, replies, strict=True))[:compared]:
            same += [a == b for a, b in itertools.zip_longest(self.cut(reply.tokens), self.reference(prompt, room))]
        at: dict[float, list[float]] = {}
        for (depth, _), score in zip(samples, scores, strict=True):
            if depth is not None:
                at.setdefault(round(depth, 3), []).append(score)
        by_depth = {depth: float(np.mean(values)) for depth, values in at.items()}
        agreement = float(np.mean(same)) if same else None
        return Figure(task, form, length, len(scores), float(np.mean(scores)), by_depth, compared, agreement)


def line(figure: Figure) -> str:
    """A figure for a person, with its interval and whether it passes."""
    low, high = wilson_interval(figure.accuracy, figure.samples)
    shown = f"{figure.length:6d}  {figure.form:10s}  {figure.task:20s} {figure.accuracy:7.1%} [{low:6.1%}, {high:6.1%}]"
    if figure.depths:
        worst = min(figure.depths, key=lambda depth: figure.depths[depth])
        shown += f"  worst depth {worst:4.0%} {figure.depths[worst]:4.0%}"
    if figure.agreement is not None:
        shown += f"  agreement {figure.agreement:.3f}"
    return shown + ("" if figure.passes else f"  below {BARS[figure.task]:.0%}")


def main(argv: list[str] | None = None) -> None:
    """Measures a model folder with the full cache; ends with status 1 if a task is below its bar at any length."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.gate", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of prompt and answer")
    parser.add_argument(
        "--depths", type=int, default=5, help="places of the needle, from the first sentence to the last"
    )
    parser.add_argument("--samples", type=int, default=10, help="of each task at each length and depth")
    parser.add_argument("--compared", type=int, default=3, help="samples of each cell that transformers answers too")
    parser.add_argument("--tasks", nargs="+", default=[*BARS, *OTHERS])
    parser.add_argument("--forms", nargs="+", choices=("completion", "chat"), default=["completion", "chat"])
    parser.add_argument("--out", type=Path, help="folder for gate.json and gate.png")
    args = parser.parse_args(argv)
    print(f"full cache, greedy, {args.depths * args.samples} held-out samples a line; accuracy with its 95% interval")
    figures: list[Figure] = []
    failed: list[str] = []
    with serving(args.model, max(args.lengths)) as engine:
        gate = RetrievalGate(args.model, engine)
        for length, form, task in itertools.product(args.lengths, args.forms, args.tasks):
            try:
                figure = gate.measure(
                    task, length, form, depths=args.depths, each=args.samples, compared=min(args.compared, args.samples)
                )
            except ValueError as error:
                print(f"{length:6d}  {form:10s}  {task:20s} not measured: {error}", flush=True)
                failed += [f"{task} {form} at {length}"] if task in BARS else []
                continue
            figures.append(figure)
            failed += [] if figure.passes else [f"{task} {form} at {length}"]
            print(line(figure), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        written = {"model": args.model.name, "bars": BARS, "failed": failed, "figures": [asdict(f) for f in figures]}
        (args.out / "gate.json").write_text(json.dumps(written, indent=1) + "\n")
        plot(figures, BARS, args.out / "gate.png")
        print(f"wrote {args.out / 'gate.json'} and {args.out / 'gate.png'}")
    print(f"gate: {'fails: ' + ', '.join(failed) if failed else 'passes'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
