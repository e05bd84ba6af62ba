"""Reproduction of a model and of its card by one command: tokenizer, training, gate, eviction, code, plots.

Each part is a command of its own as well. A second call resumes where the first was killed.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.model_card import code, curve, eviction, gate
from kvjax.eval.tasks.library import standard_library
from kvjax.train.config import StageConfig, TrainConfig, read_config
from kvjax.train.tokenizer import save_tokenizer, train_tokenizer
from kvjax.train.trainer import Trainer

TOY_STAGES = 3
TOY_STEPS = 6


def toy(config: TrainConfig) -> TrainConfig:
    """The same run so small that two CPU cores do it in minutes; it learns nothing. In folders of its own."""

    def small(stage: StageConfig) -> StageConfig:
        return dataclasses.replace(stage, batch=2, steps=TOY_STEPS, warmup=2, cooldown=min(stage.cooldown, 2))

    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layers=2, width=32, mlp_width=64, heads=2, kv_heads=1, head_dim=16),
        stages=tuple(small(stage) for stage in config.stages[:TOY_STAGES]),
        tokenizer=config.runs / "toy" / "model",
        export=None,
        runs=config.runs / "toy",
        processes=min(config.processes, 2),
        evaluate_every=TOY_STEPS // 2,
        evaluate_batch=2,
        save_every=TOY_STEPS // 2,
    )


def train(config: TrainConfig) -> None:
    """Makes the tokenizer if there is none, then trains or goes on training."""
    if not (config.tokenizer / "tokenizer.json").is_file():
        texts = [text for _, text in standard_library()]
        save_tokenizer(train_tokenizer(texts, vocabulary=config.vocabulary), config.tokenizer)
    config.runs.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config)
    print(f"{trainer.parameters / 1e6:.2f}M parameters, {config.model.dtype}; checkpoints in {config.runs}", flush=True)
    trainer.run()
    size = (config.folder / "model.safetensors").stat().st_size
    print(f"{config.folder / 'model.safetensors'}: {size / 1e6:.1f} MB")


def passed(command: Callable[[list[str]], None], arguments: list[str]) -> bool:
    """Runs a measuring command; whether it ended with status 0."""
    try:
        command(arguments)
    except SystemExit as ended:
        return not ended.code
    return True


def prove(config: TrainConfig, out: Path, *, small: bool, compared: int) -> dict[str, bool]:
    """Measures the trained model; figures and pictures go to `out`. Which measurements passed, by name."""
    contexts = sorted({stage.context for stage in config.stages})
    # a long sample is found by tokenising it over and over: more lengths or samples would outlast the training
    lengths = [str(context) for context in contexts if context >= (128 if small else 512)]
    model = ["--model", str(config.folder)]
    depths = ["--depths", "2", "--samples", "1"] if small else ["--depths", "10", "--samples", "5"]
    longest = ["--lengths", *lengths[-2:], "--samples", "2" if small else "100"]
    length = ["--length", str(min(contexts[-1], 2048)), "--samples", "3" if small else "200"]
    return {
        "gate": passed(
            gate.main, [*model, "--lengths", *lengths, *depths, "--compared", str(compared), "--out", str(out)]
        ),
        "eviction": passed(eviction.main, [*model, *longest, "--json", str(out / "eviction.json")]),
        "code": passed(code.main, [*model, *length, "--json", str(out / "code.json")]),
    }


def main(argv: list[str] | None = None) -> None:
    """Trains and measures; ends with status 1 if a measurement does not pass (a toy never does, and ends with 0)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.reproduce", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="rehearse at toy size")
    parser.add_argument("--compared", type=int, default=0, help="samples of each cell for transformers (needs torch)")
    parser.add_argument("--out", type=Path, help="folder for figures and pictures; `report` in the run's folder if not")
    args = parser.parse_args(argv)
    config = read_config(args.config)
    config = toy(config) if args.toy else config
    out: Path = args.out or config.runs / "report"
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train(config)
    trained = time.perf_counter() - start
    curve.plot(config, out / "curve.png")
    print("\n".join([*curve.stages(config), curve.summary(config)]), flush=True)
    results = prove(config, out, small=args.toy, compared=args.compared)
    whole = {"config": str(args.config), "summary": curve.summary(config), "seconds": trained, "passed": results}
    (out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(
        f"trained in {trained:.0f} s by this call; wrote {out}; " + ", ".join(f"{k}: {v}" for k, v in results.items())
    )
    raise SystemExit(not args.toy and not all(results.values()))


if __name__ == "__main__":
    main()
