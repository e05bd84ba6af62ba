"""Searched budgets: accuracy of tasks by token budgets by allocators, and candidates evaluated a second.

    python -m benchmarks.budgets [--tasks needles code chains] [--token-budgets 32 64 128] [--output FILE.json]

For each task and budget evolution searches in both modes, and greedy and random search at equal cost; uniform, the
pyramids, entropy, streaming and the full cache stand beside them. Only test samples are reported, which no search has
seen. Finished searches are in `--runs`: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.report import write_report
from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.search.allocators.evolution import Mode
from kvjax.search.config import SearchConfig
from kvjax.search.context import SearchContext
from kvjax.search.outcome import FULL, Interval
from kvjax.search.report.formatting import gained
from kvjax.search.report.tables import outcomes, table
from kvjax.search.result import SearchResult, plain
from kvjax.search.run import PACKAGES, Search, search
from kvjax.search.spaces import Candidate
from kvjax.store.digest import weights_digest

HEURISTICS = ("uniform", "pyramid", "streaming")  # what the paper compares with
COMPARED_CANDIDATES = 4  # evaluated one at a time through the engine


@dataclasses.dataclass(frozen=True)
class Row:
    """The searches of one task.

    Attributes:
        budgets: tokens a layer.
        fields: of `SearchConfig`.
    """

    budgets: tuple[int, ...]
    fields: dict[str, Any]


TASKS = {
    "needles": Row((48, 128, 256), {"tasks": ("mini/niah_multikey_1", "mini/niah_multikey_2"), "length": 1024}),
    # few next lines come out whole, with any cache; 16 tokens are 1.5% of this one
    "code": Row(
        (16, 48, 128), {"tasks": ("mini/next_line",), "measure": "tokens", "query_aware": True, "length": 1024}
    ),
    "chains": Row((24, 48, 96), {"tasks": ("mini/chain",), "measure": "tokens", "length": 256}),
}


def settings(args: argparse.Namespace, task: str, budget: int, mode: Mode) -> SearchConfig:
    """The search of one cell of the table."""
    project, fields = mode == "project", dict(TASKS[task].fields)
    if args.length is not None:
        fields["length"] = args.length
    return SearchConfig(
        model=args.model,
        token_budget=budget,
        allocator="evolution",
        mode=mode,
        evaluations=args.evaluations,
        samples=args.samples,
        selection=2 * args.samples,
        test=6 * args.samples,
        compare=("greedy", "fine-greedy", "random", "streaming") if project else (),
        seed=args.seed,
        runs=args.runs / f"{task}-{budget}-{mode}",
        output=args.runs / f"{task}-{budget}-{mode}.json",
        **fields,
    )


def cached_search(config: SearchConfig, context: Callable[[], SearchContext]) -> SearchResult:
    """The result of a search, unless it was made before by the same config and with the same weights."""
    assert config.output is not None
    path = config.output.with_suffix(".search.json")
    if path.exists():
        result = SearchResult.from_json(path.read_text())
        if result.config == config and result.model.weights == weights_digest(config.model):
            return result
    return search(config, context=context())


def points(gain: Interval) -> str:
    """A paired difference as points, '+8.6 (+3.1 to +14.1)'."""
    return "{} ({})".format(*gained(gain))


def verdict(project: SearchResult, paper: SearchResult) -> dict[str, Any]:
    """One cell: both modes against the best heuristic, uniform, greedy and the full cache, paired by sample."""
    best = max((project.outcome(name) for name in HEURISTICS), key=lambda outcome: outcome.test.mean)
    modes = {"project": project.outcome("evolution"), "paper": paper.outcome("evolution")}
    others = {name: project.outcome(name) for name in ("uniform", "greedy", "fine-greedy", "random", FULL)}
    return {
        "best_heuristic": best.name,
        "full_cache": others[FULL].test.mean,
        **{
            mode: {
                "test": plain(result.test),
                "over_best_heuristic": result.over(best),
                **{f"over_{name.replace(' ', '_')}": result.over(other) for name, other in others.items()},
                "calibration_gap": result.calibration_gap,
                "evaluations": result.evaluations,
                "seconds": result.seconds,
            }
            for mode, result in modes.items()
        },
        "greedy": {
            "test": plain(others["greedy"].test),
            "over_best_heuristic": others["greedy"].over(best),
            "over_full_cache": others["greedy"].over(others[FULL]),
            "calibration_gap": others["greedy"].calibration_gap,
            "evaluations": others["greedy"].evaluations,
            "seconds": others["greedy"].seconds,
        },
    }


def verdicts(cells: dict[tuple[str, int], dict[str, Any]]) -> Table:
    """The terminal's table of paired differences: a row for each cell and way to search."""
    rendered = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    heads = ("", "by", "test", "over best heuristic", "over greedy", "over full", "gap", "evaluated", "seconds")
    for head in heads:
        rendered.add_column(head, justify="left" if head in ("", "by") else "right", no_wrap=True)
    for (task, budget), cell in cells.items():
        for by in ("project", "paper", "greedy"):
            result = cell[by]
            rendered.add_row(
                f"{task} {budget}" if by == "project" else "",
                by,
                f"{100 * result['test']['mean']:.1f}",
                f"{points(result['over_best_heuristic'])} {cell['best_heuristic']}",
                points(result["over_greedy"]) if by != "greedy" else "",
                points(result["over_full_cache"]),
                f"{100 * result['calibration_gap']:+.1f}",
                str(result["evaluations"]),
                f"{result['seconds']:.0f}",
            )
    return rendered


def speed(result: SearchResult) -> dict[str, float]:
    """Candidates a second: a population in one call, and the same samples through the engine, one candidate at a time.

    The engine's figure flatters it: one engine answers for a uniform candidate all over again, though each candidate
    would need one of its own, which is compiled anew.
    """
    config = dataclasses.replace(result.config, runs=None, warm_start="uniform", compare=())
    running = Search(config)
    space, rng = running.space, np.random.default_rng(0)
    candidates = np.array([space.decode(point) for point in rng.standard_normal((4 * config.batch, space.dims))])
    running.context.evaluate("search", candidates)  # compiles
    began = time.perf_counter()
    running.context.evaluate("search", candidates)
    together = len(candidates) / (time.perf_counter() - began)
    cases = running.context.sets.search
    with _engine(result, result.uniform) as engine:
        prompts = [[*case.prompt, *case.tail[: -case.reply]] for case in cases]
        params = [
            SamplingParams(temperature=0.0, max_tokens=case.reply, ignore_eos=True, compress_after=len(case.prompt))
            for case in cases
        ]
        engine.generate(prompts[:1], params[:1], progress=False)
        began = time.perf_counter()
        for _ in range(COMPARED_CANDIDATES):
            engine.generate(prompts, params, progress=False)
        alone = COMPARED_CANDIDATES / (time.perf_counter() - began)
    return {
        "candidates_a_second": together,
        "candidates_a_second_by_the_engine": alone,
        "ratio": together / alone,
        "samples": len(cases),
    }


def memory(result: SearchResult) -> dict[str, float]:
    """Bytes of K and V that an engine holds for one sequence, counted on its device: full cache, uniform, found.

    Beside them what the profiles say. A view has room for generated tokens besides what it keeps of a prompt.
    """
    sizes: dict[str, float] = {}
    for name, candidate in (("full_cache", None), ("uniform", result.uniform), ("found", result.chosen.candidate)):
        with _engine(result, candidate) as engine:
            sizes[f"kv_bytes_of_a_sequence_{name}"] = engine.view_bytes / engine.layout.max_num_seqs
        if candidate is not None:
            model = result.model
            expected = result.profile_of(candidate).nbytes(model.kv_heads, model.head_dim, "float32")
            sizes[f"kv_bytes_as_the_profile_says_{name}"] = expected
    return sizes


def _engine(result: SearchResult, candidate: Candidate | None) -> Engine:
    """An engine with a candidate's profile, or with the full cache."""
    config, profile = result.config, None
    if candidate is not None:
        assert config.output is not None
        profile = config.output.with_suffix(".served.json")
        result.profile_of(candidate).save(profile, result.model)
    most = config.length + config.headroom
    budgets = None if profile is None else str(profile)
    return Engine.from_pretrained(
        config.model, EngineConfig(budgets=budgets, headroom=config.headroom, max_model_len=most)
    )


def main(argv: list[str] | None = None) -> None:
    """Measures the accuracy of searched budgets, and the speed of finding them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("models/kvjax_small"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--token-budgets", type=int, nargs="+", help="for every task; else three of its own")
    parser.add_argument("--length", type=int, help="tokens of prompt and reply, for every task; else its own")
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument(
        "--samples", type=int, default=24, help="of the search set; 2 and 6 times as many of the others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/budgets"))
    parser.add_argument("--output", type=pathlib.Path, help="also write the figures here, as JSON")
    parser.add_argument("--plots", type=pathlib.Path, help="also draw the table and each task's front into this folder")
    parser.add_argument("--table-only", action="store_true", help="without candidates a second and bytes held")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    results: dict[tuple[str, int], dict[Mode, SearchResult]] = {}
    modes: tuple[Mode, ...] = ("project", "paper")
    for task in args.tasks:
        budgets = args.token_budgets or TASKS[task].budgets
        context = functools.cache(functools.partial(SearchContext, settings(args, task, budgets[0], "project")))
        for budget in budgets:
            results[task, budget] = {mode: cached_search(settings(args, task, budget, mode), context) for mode in modes}
            for result in results[task, budget].values():
                Console().print(outcomes(result))
    every = [result for cell in results.values() for result in cell.values()]
    wide = Console(width=160)  # also where the output is a file
    wide.print(table(every))
    cells = {key: verdict(cell["project"], cell["paper"]) for key, cell in results.items()}
    wide.print(verdicts(cells))
    measured = {} if args.table_only else speed(every[0]) | memory(every[0])
    for name, value in measured.items():
        print(f"{name.replace('_', ' '):40s} {value:,.2f}")
    if args.plots is not None:
        draw(args.plots, results)
    if args.output is not None:
        rows = [
            {
                "task": task,
                "token_budget": budget,
                "verdict": cells[task, budget],
                **{
                    mode: {
                        "config": plain(result.config),
                        "chosen": result.chosen.name,
                        "outcomes": [plain(dataclasses.replace(each, each=())) for each in result.outcomes],
                    }
                    for mode, result in cell.items()
                },
            }
            for (task, budget), cell in results.items()
        ]
        command = " ".join(["python -m benchmarks.budgets", *(sys.argv[1:] if argv is None else argv)])
        write_report(args.output, command, [*rows, measured] if measured else rows, PACKAGES)


def draw(folder: pathlib.Path, results: dict[tuple[str, int], dict[Mode, SearchResult]]) -> None:
    """The table of all searches, and accuracy against bytes of each task."""
    from kvjax.search.report import plots

    folder.mkdir(parents=True, exist_ok=True)
    project = {key: cell["project"] for key, cell in results.items()}
    plots.table(list(project.values())).savefig(folder / "table.png")
    for task in dict.fromkeys(task for task, _ in project):
        sweep = [result for (name, _), result in project.items() if name == task]
        plots.pareto(sweep).savefig(folder / f"{task}.png")
        for name in ("budgets", "convergence", "generations"):
            getattr(plots, name)(sweep[0]).savefig(folder / f"{task}-{name}.png")


if __name__ == "__main__":
    main()
