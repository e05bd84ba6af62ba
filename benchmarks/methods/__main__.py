"""Accuracy of compression methods at the same token budgets: kvjax's table of methods.

    python -m benchmarks.methods [--model FOLDER] [--output benchmarks/results/methods.json]

Every arm answers the same generated samples greedily. It does so in four ways: with the question in sight when a
method chooses what to keep, with the question hidden, and with several questions on one context, where each turn
chooses anew or lives with what the first one kept. What is measured is written at once: the same command again goes on
where it stopped, and prints the tables at the end.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

import kvjax
from benchmarks.common.report import former_rows, write_rows
from benchmarks.methods.cell import Cell, cells
from benchmarks.methods.table import equal_tables, tables
from kvjax.eval.arguments import COMPILE_CACHE
from kvjax.eval.command_target import keep_compiled, small_model
from kvjax.eval.metrics import mean_interval
from kvjax.eval.record import Record
from kvjax.eval.runner import Case, Conduct, evaluate
from kvjax.eval.tasks import CountTokens, Sample, Task, find_task

if TYPE_CHECKING:  # these import JAX, which needs its compile cache set first
    from benchmarks.methods.engines import Engines
    from kvjax.engine import Engine

ARMS = (
    "full", "topk-per-head", "topk", "rocketkv-faithful", "rocketkv", "rocketkv-mt", "rocketkv-stage1",
    "rocketkv-stage2", "snapkv", "pyramidkv", "streaming", "quest",
)  # fmt: skip
TASKS = ("mini/niah_single_2", "mini/niah_multikey_1", "mini/niah_multikey_2", "mini/vt")
TURNS = ("mini/turns_niah", "mini/turns_kv")
SAVING = 60.0  # seconds in which an engine that ends has written what it read


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
    Mode("agnostic", Conduct(query_agnostic=True), like="aware"),
    Mode("anew", Conduct(), turns=True),
    Mode("evicted", Conduct(evict=True), turns=True, like="anew"),
)


@dataclass(frozen=True)
class Settings:
    """The settings that all cells share; results of other settings are not joined with these."""

    model: str
    files: str
    kvjax: str
    tasks: tuple[str, ...]
    turns: tuple[str, ...]
    samples: int
    turn_samples: int
    seed: int
    headroom: int
    chunk: int


@dataclass(frozen=True)
class Drawn:
    """A task that draws each sample once: every engine asks the same ones, and drawing one takes as long as asking."""

    task: Task
    samples: dict[tuple[int, int], Sample] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def metric(self) -> str:
        return self.task.metric

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """As the task's own; `count` of every engine is that of the same tokenizer."""
        if (length, seed) not in self.samples:
            self.samples[length, seed] = self.task.sample(length=length, seed=seed, count=count)
        return self.samples[length, seed]


Tasks = Mapping[str, Drawn]


def measure(served: Sequence[Cell], engines: "Engines", settings: Settings, tasks: Tasks) -> Iterator[dict[str, Any]]:
    """A row for each cell of one engine: the bytes and the scores of each mode, or why it is refused."""
    from kvjax.engine import Engine

    began = time.monotonic()
    try:
        engine = Engine.from_pretrained(engines.folder, engines.config(max(served, key=lambda cell: cell.budget or 0)))
    except ValueError as error:
        for cell in served:
            yield {**vars(cell), "refused": str(error)}
        return
    with engine:
        for cell in served:
            row = ask(engine, cell, engines, settings, tasks)
            yield row | {"seconds": round(time.monotonic() - began, 1)}
            began = time.monotonic()
        engine.drain(SAVING)


def ask(engine: "Engine", cell: Cell, engines: "Engines", settings: Settings, tasks: Tasks) -> dict[str, Any]:
    """The row of a cell, asked of an engine that is ready."""
    from kvjax.eval.targets.engine import EngineTarget

    caches = engine.caches.within(cell.budget)
    row = {**vars(cell), "refused": None, "context": engine.max_model_len, "dtype": engine.layout.dtype}
    row |= {"full": caches.full_bytes(cell.length)}
    row |= {"kept": caches.retained_bytes(cell.length), "read": caches.read_bytes(cell.length)}
    target, before = EngineTarget(engine, token_budget=cell.budget), engine.stats()
    modes: dict[str, Any] = {}
    for mode in MODES:
        if mode.like is not None and not caches.window:
            modes[mode.name] = modes[mode.like] | {"like": mode.like}
            continue
        names, count = settings.tasks, settings.samples
        if mode.turns:
            names, count = settings.turns, settings.turn_samples
        drawn_tasks = [tasks[name] for name in names]
        cases = [Case(task, cell.length, index) for index in range(count) for task in drawn_tasks]
        conduct = replace(mode.conduct, seed=settings.seed, concurrency=engines.slots)
        modes[mode.name] = summarize(evaluate(target, cases, conduct), drawn_tasks)
    stats = engine.stats()
    reused = stats.cached_tokens - before.cached_tokens
    row |= {"reused": round(reused / max(stats.prompt_tokens - before.prompt_tokens, 1), 3)}
    return row | {"modes": modes}


def summarize(records: Sequence[Record], tasks: Sequence[Task]) -> dict[str, Any]:
    """Each task's mean score with its interval, and all tasks' together; `said` is a digest of each sample's answers.

    The interval of the mean over tasks is that of all scores in one, which is no narrower than theirs are.
    """
    entries: dict[str, Any] = {}
    for task in tasks:
        own = sorted((record for record in records if record.task == task.name), key=lambda record: record.index)
        scores = [record.score for record in own if record.score is not None]
        entries[task.name] = {
            **_mean(scores),
            "failed": len(own) - len(scores),
            "scores": {str(record.index): record.score for record in own if record.score is not None},
            "errors": sorted({record.error for record in own if record.error is not None}),
            "said": {str(record.index): _digest(record) for record in own if record.error is None},
        }
    means = [entry["mean"] for entry in entries.values() if entry["mean"] is not None]
    together = _mean([record.score for record in records if record.score is not None])
    if means:
        together["mean"] = sum(means) / len(means)
    return {"tasks": entries, **together}


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    mean, low, high = mean_interval(scores) if scores else (None, None, None)
    return {"mean": mean, "low": low, "high": high, "scored": len(scores)}


def _digest(record: Record) -> str:
    texts = json.dumps([turn.text for turn in record.turns])
    return hashlib.sha256(texts.encode()).hexdigest()[:8]


def known_rows(path: pathlib.Path, settings: Settings) -> dict[Cell, dict[str, Any]]:
    """The rows of a former run.

    Raises:
        ValueError: the file is something else, or holds results of other settings.
    """
    return {Cell(row["arm"], row["budget"], row["length"]): row for row in former_rows(path, vars(settings))}


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises OSError if there is no such folder."""
    from benchmarks.methods.engines import CHUNK
    from kvjax.eval.targets.engine import fingerprint

    folder = args.model or small_model()
    return Settings(
        folder.resolve().name, fingerprint(folder), kvjax.__version__, tuple(args.tasks), tuple(args.turns),
        args.samples, args.turn_samples or args.samples, args.seed, args.headroom, CHUNK,
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
    parser.add_argument("--turn-samples", type=int, help="of each task of several turns (default: as --samples)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headroom", type=int, default=64, help="of a view, for generated tokens (default: 64)")
    parser.add_argument("--concurrency", type=int, default=4, help="samples asked at once (default: 4)")
    parser.add_argument("--store", metavar="DIR", help="keeps the KV of prompts for later runs; none: no such store")
    parser.add_argument("--compile-cache", default=COMPILE_CACHE, metavar="DIR", help="none: compile anew")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing and prints all of it; returns the exit status."""
    args = build_parser().parse_args(arguments)
    keep_compiled(args.compile_cache)
    import jax

    from benchmarks.methods.engines import Engines

    folder = args.model or small_model()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    try:
        settings = settings_of(args)
        for name in (*settings.tasks, *settings.turns):
            find_task(name)
        rows = known_rows(args.output, settings)
    except (KeyError, OSError, ValueError) as error:
        print(f"benchmarks.methods: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    requested = cells(args.arms, args.budgets, args.lengths)
    engines = Engines(folder, args.headroom, args.concurrency)
    every = list(dict.fromkeys([*requested, *equals(requested, engines)]))
    left = [cell for cell in every if cell not in rows]
    if len(left) < len(every):
        out.print(f"{len(every) - len(left)} of {len(every)} cells are in {args.output} already")
    with contextlib.ExitStack() as resources:
        if left and args.store != "none":
            disk = pathlib.Path(args.store or resources.enter_context(tempfile.TemporaryDirectory()))
            prompts = settings.samples * len(settings.tasks) + settings.turn_samples * len(settings.turns)
            engines = engines.keeping(prompts, sorted({cell.length for cell in left}), disk)
        number, tasks = 0, {name: Drawn(find_task(name)) for name in (*settings.tasks, *settings.turns)}
        for _, same in itertools.groupby(engines.shared(left), key=lambda served: served[0].length):
            for served in same:
                for cell, row in zip(served, measure(served, engines, settings, tasks), strict=True):
                    rows[cell], number = row, number + 1
                    write_rows(args.output, "benchmarks.methods", list(rows.values()), vars(settings))
                    out.print(f"{number}/{len(left)}  {cell}: {line(row)}", markup=False)
            jax.clear_caches()  # engines of one length share some of what they compile; all of a run is too much
    for part in tables([rows[cell] for cell in requested]):
        out.print(part)
    for part in equal_tables([rows[cell] for cell in every]):
        out.print(part)
    return 0


def equals(requested: Sequence[Cell], engines: "Engines") -> list[Cell]:
    """RocketKV of whole pages where it reads as many bytes a step as the published one, if both are asked for."""
    arms, paged = {cell.arm for cell in requested}, []
    for cell in requested if "rocketkv" in arms else ():
        if cell.arm == "rocketkv-faithful":
            with contextlib.suppress(ValueError):  # refused, as its row will say
                paged.append(engines.equal(cell))
    return [cell for cell in paged if cell is not None]


def line(row: Mapping[str, Any]) -> str:
    """A row for whoever watches."""
    if row["refused"]:
        return row["refused"]
    scores = [f"{name} {100 * mode['mean']:.1f}" for name, mode in row["modes"].items() if mode["scored"]]
    return f"{', '.join(scores)}  ({row['seconds']:.0f} s, {row['reused']:.0%} of the prompts' tokens from the store)"


if __name__ == "__main__":
    sys.exit(main())
