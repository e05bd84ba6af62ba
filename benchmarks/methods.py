"""How much of a model's answers each method leaves, at the same token budgets: kvjax's table of methods.

    python -m benchmarks.methods [--model FOLDER] [--output benchmarks/results/methods.json]

Every arm answers the same generated samples greedily, one engine for each arm, budget and length. It does so in four
ways: with the question in sight when a method chooses what to keep, with the question hidden, and with several
questions on one context, where each turn chooses anew or lives with what the first one kept. What is measured is
written at once: the same command again goes on where it stopped, and prints the tables at the end.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

import kvjax
from benchmarks.methods_table import tables
from benchmarks.report import former_rows, write_rows
from kvjax.eval.arguments import COMPILE_CACHE
from kvjax.eval.metrics import mean_interval
from kvjax.eval.record import Record
from kvjax.eval.runner import Case, Conduct, evaluate
from kvjax.eval.target_open import keep_compiled, small_model
from kvjax.eval.tasks import Task, find_task

ARMS = (
    "full", "topk-per-head", "topk", "rocketkv-faithful", "rocketkv", "rocketkv-mt", "rocketkv-stage1",
    "rocketkv-stage2", "snapkv", "pyramidkv", "streaming", "quest",
)  # fmt: skip
TASKS = ("mini/niah_single_2", "mini/niah_multikey_1", "mini/niah_multikey_2", "mini/vt")
TURNS = ("mini/turns_niah", "mini/turns_kv")
MARGIN = 256  # tokens beyond a sample's length: answers in several turns may be longer than the right ones


@dataclass(frozen=True)
class Mode:
    """One way to ask.

    Attributes:
        turns: whether it asks the tasks of several turns, or those of one.
        like: the mode that it equals where a method keeps everything; None if it is asked of every method.
    """

    name: str
    conduct: Conduct
    turns: bool = False
    like: str | None = None


MODES = (
    Mode("aware", Conduct()),
    Mode("agnostic", Conduct(agnostic=True), like="aware"),
    Mode("anew", Conduct(), turns=True),
    Mode("evicted", Conduct(evict=True), turns=True, like="anew"),
)


@dataclass(frozen=True)
class Cell:
    """What one engine measures: an arm with a token budget, None for the full cache, at a length in tokens."""

    arm: str
    budget: int | None
    length: int

    def __str__(self) -> str:
        return f"{self.arm}{'' if self.budget is None else f' {self.budget}'} at {self.length:,}"


@dataclass(frozen=True)
class Settings:
    """What every cell has in common; results of other settings are not joined with these."""

    model: str
    files: str
    kvjax: str
    tasks: tuple[str, ...]
    turns: tuple[str, ...]
    samples: int
    seed: int
    room: int


def cells(arms: Sequence[str], budgets: Sequence[int], lengths: Sequence[int]) -> list[Cell]:
    """All cells, those of a length together: a table of it is whole before the next one begins."""
    return [
        Cell(arm, budget, length)
        for length in lengths
        for arm in arms
        for budget in ((None,) if arm == "full" else budgets)
    ]


def measure(cell: Cell, settings: Settings, folder: pathlib.Path, concurrency: int) -> dict[str, Any]:
    """One row: the bytes and the scores of each mode, or why the method refuses the budget."""
    import jax

    from kvjax.engine import Engine, EngineConfig
    from kvjax.eval.target_engine import EngineTarget
    from kvjax.models import read_config

    row: dict[str, Any] = {"arm": cell.arm, "budget": cell.budget, "length": cell.length, "refused": None}
    context = min(cell.length + MARGIN, read_config(folder).max_position)
    began = time.monotonic()
    try:
        config = EngineConfig(
            max_model_len=context,
            max_num_seqs=concurrency,
            method=cell.arm,
            token_budget=cell.budget,
            room=settings.room,
        )
        engine = Engine.from_pretrained(folder, config)
    except ValueError as error:
        return row | {"refused": str(error)}
    caches = engine.caches
    row |= {"context": context, "dtype": engine.layout.dtype, "full": caches.full_bytes(cell.length)}
    row |= {"kept": caches.kept_bytes(cell.length), "read": caches.read_bytes(cell.length)}
    modes: dict[str, Any] = {}
    with engine:
        target = EngineTarget(engine)
        for mode in MODES:
            if mode.like is not None and not caches.window:
                modes[mode.name] = modes[mode.like] | {"like": mode.like}
                continue
            tasks = [find_task(name) for name in (settings.turns if mode.turns else settings.tasks)]
            cases = [Case(task, cell.length, index) for index in range(settings.samples) for task in tasks]
            conduct = replace(mode.conduct, seed=settings.seed, concurrency=concurrency)
            modes[mode.name] = summarize(evaluate(target, cases, conduct), tasks)
    jax.clear_caches()  # a process that compiles for a hundred engines would keep all of it
    return row | {"modes": modes, "seconds": round(time.monotonic() - began, 1)}


def summarize(records: Sequence[Record], tasks: Sequence[Task]) -> dict[str, Any]:
    """Each task's mean score with its interval, and all tasks' together; `said` is a digest of each sample's answers.

    The interval of the mean over tasks is that of all scores in one, which is no narrower than theirs are.
    """
    found: dict[str, Any] = {}
    for task in tasks:
        own = sorted((record for record in records if record.task == task.name), key=lambda record: record.index)
        scores = [record.score for record in own if record.score is not None]
        found[task.name] = {
            **_mean(scores),
            "failed": len(own) - len(scores),
            "errors": sorted({record.error for record in own if record.error is not None}),
            "said": {str(record.index): _digest(record) for record in own if record.error is None},
        }
    means = [entry["mean"] for entry in found.values() if entry["mean"] is not None]
    together = _mean([record.score for record in records if record.score is not None])
    if means:
        together["mean"] = sum(means) / len(means)
    return {"tasks": found, **together}


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(scores) if scores else (None, None, None)
    return {"mean": mean, "low": low, "high": high, "scored": len(scores)}


def _digest(record: Record) -> str:
    said = json.dumps([turn.text for turn in record.turns])
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def known_rows(path: pathlib.Path, settings: Settings) -> dict[Cell, dict[str, Any]]:
    """The rows of a former run.

    Raises:
        ValueError: the file is something else, or holds results of other settings.
    """
    return {Cell(row["arm"], row["budget"], row["length"]): row for row in former_rows(path, vars(settings))}


def settings_of(given: argparse.Namespace) -> Settings:
    """Raises OSError if there is no such folder."""
    from kvjax.eval.target_engine import fingerprint

    folder = given.model or small_model()
    return Settings(
        folder.resolve().name, fingerprint(folder), kvjax.__version__, tuple(given.tasks), tuple(given.turns),
        given.samples, given.seed, given.room,
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=pathlib.Path, help="a folder in the Hugging Face format (default: ours)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/methods.json"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="NAME", help=", ".join(ARMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 128, 256], metavar="TOKENS")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048], metavar="TOKENS")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="NAME", help="of one turn")
    parser.add_argument("--turns", nargs="+", default=list(TURNS), metavar="NAME", help="tasks of several turns")
    parser.add_argument("--samples", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", type=int, default=64, help="of a view, for generated tokens (default: 64)")
    parser.add_argument("--concurrency", type=int, default=4, help="samples asked at once (default: 4)")
    parser.add_argument("--compile-cache", default=COMPILE_CACHE, metavar="DIR", help="none: compile anew")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing and prints all of it; returns the exit status."""
    given = build_parser().parse_args(arguments)
    keep_compiled(given.compile_cache)
    folder = given.model or small_model()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    try:
        settings = settings_of(given)
        for name in (*settings.tasks, *settings.turns):
            find_task(name)
        rows = known_rows(given.output, settings)
    except (KeyError, OSError, ValueError) as error:
        print(f"benchmarks.methods: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    wanted = cells(given.arms, given.budgets, given.lengths)
    left = [cell for cell in wanted if cell not in rows]
    if len(left) < len(wanted):
        out.print(f"{len(wanted) - len(left)} of {len(wanted)} arms are in {given.output} already")
    for number, cell in enumerate(left, start=1):
        rows[cell] = row = measure(cell, settings, folder, given.concurrency)
        write_rows(given.output, "benchmarks.methods", list(rows.values()), vars(settings))
        scores = [f"{name} {100 * mode['mean']:.1f}" for name, mode in row.get("modes", {}).items() if mode["scored"]]
        said = row["refused"] or f"{', '.join(scores)}  ({row['seconds']:.0f} s)"
        out.print(f"{number}/{len(left)}  {cell}: {said}", markup=False)
    for part in tables([rows[cell] for cell in wanted]):
        out.print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
