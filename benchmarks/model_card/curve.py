"""Training curves: a run's log as figures and a plot over the tokens learned from."""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from kvjax.train.config import TrainConfig, read_config


def history(config: TrainConfig) -> list[dict[str, Any]]:
    """The log's lines in order of steps with `tokens` learned from so far; of a step done twice the last line.

    A run that was killed and resumed has done some steps twice, in the same bits.

    Raises:
        FileNotFoundError: nothing was evaluated yet.
    """
    path = config.runs / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train first")
    lines = {line["total"]: line for line in map(json.loads, path.read_text().splitlines())}
    evaluations, tokens, before = [], 0, 0
    for total in sorted(lines):
        stage = config.stages[lines[total]["stage"]]
        tokens += (total - before) * stage.batch * stage.context
        before = total
        evaluations.append(lines[total] | {"tokens": tokens})
    return evaluations


def summary(config: TrainConfig) -> str:
    """Tokens and seconds of the whole run: steps only, without evaluations and compiling again after a kill."""
    lines = history(config)
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
    last = lines[-1]
    return f"{last['total']} steps, {last['tokens'] / 1e6:.1f}M tokens, {seconds:.0f} s, context {last['context']}"


def stages(config: TrainConfig) -> list[str]:
    """The end of each stage, and where retrieval appeared: the first evaluation that has half of all recall right."""
    lines = history(config)
    report = []
    last = {line["stage"]: line for line in lines}
    for line in last.values():
        shown = "  ".join(f"{kind} {s['tokens']:.3f}/{s['replies']:.3f}" for kind, s in line["scores"].items())
        report.append(
            f"context {line['context']:5d}  {line['total']:6d} steps  {line['tokens'] / 1e6:7.2f}M tokens  {shown}"
        )
    recalled = [(line, line["scores"]["recall"]["tokens"]) for line in lines if "recall" in line["scores"]]
    at = next((index for index, (_, share) in enumerate(recalled) if share >= 0.5), None)
    if at is not None:
        sides = [f"{share:.2f} at step {line['total']}" for line, share in recalled[max(at - 1, 0) : at + 1]]
        report.append(
            f"retrieval appeared: recall {' and '.join(sides)}, {recalled[at][0]['tokens'] / 1e6:.2f}M tokens"
        )
    return report


def plot(config: TrainConfig, path: Path) -> None:
    """Writes a PNG.

    Raises:
        FileNotFoundError: nothing was evaluated yet.
        ImportError: matplotlib is missing.
    """
    lines = history(config)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "kvjax[train]"') from error
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for kind in dict.fromkeys(kind for line in lines for kind in line["scores"]):
        own = [line for line in lines if kind in line["scores"]]
        # in Python text every token counts, so no stretch of it is ever right as a whole
        unit = "tokens" if kind in ("python", "repeats") else "replies"
        places, shares = [line["tokens"] / 1e6 for line in own], [line["scores"][kind][unit] for line in own]
        axes.plot(places, shares, marker=".", label=f"{kind}, {unit}")
    for before, line in itertools.pairwise(lines):
        if line["stage"] != before["stage"]:
            axes.axvline(before["tokens"] / 1e6, color="grey", linewidth=0.8, linestyle=":")
            axes.text(before["tokens"] / 1e6, 1.03, f" {line['context']}", fontsize="small", color="grey")
    axes.set_ylim(-0.02, 1.08)
    axes.set_xlabel("million tokens learned from; dotted: the next context")
    axes.set_ylabel("share predicted, held out")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Prints how each stage of a run ended (tokens/replies predicted) and its totals; draws what was learned when."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.curve", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a PNG")
    args = parser.parse_args(argv)
    config = read_config(args.config)
    print("\n".join([*stages(config), summary(config)]))
    if args.out:
        plot(config, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
