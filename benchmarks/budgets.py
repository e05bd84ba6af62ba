"""What searched budgets are worth: tasks by token budgets by allocators, and candidates a second.

    python -m benchmarks.budgets [--tasks needles code chains] [--token-budgets 32 64 128] [--output FILE.json]

For each task and budget evolution searches in both modes, and greedy and random search at equal cost; uniform, the
pyramids, entropy and the full cache stand beside them. Only test samples are reported, which no search has seen.
What is done is kept in `--runs`: the same command again goes on where it stopped.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.report import write_report
from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.search.config import SearchConfig
from kvjax.search.result import SearchResult, plain
from kvjax.search.run import PACKAGES, Search, search
from kvjax.search.show import outcomes, table
from kvjax.store.digest import weights_digest

TASKS: dict[str, dict[str, Any]] = {
    "needles": {"tasks": ("mini/niah_multikey_1", "mini/niah_multikey_2")},
    "code": {"tasks": ("mini/next_line",), "measure": "tokens", "aware": True},
    "chains": {"tasks": ("mini/chain",)},
}
COMPARED_CANDIDATES = 4  # judged one at a time through the engine


def settings(args: argparse.Namespace, task: str, budget: int, mode: str) -> SearchConfig:
    """The search of one cell of the table."""
    return SearchConfig(
        model=args.model,
        token_budget=budget,
        length=args.length,
        mode=mode,  # type: ignore[arg-type]
        warm_start="greedy" if mode == "project" else "uniform",
        evaluations=args.evaluations,
        samples=args.samples,
        selection=2 * args.samples,
        test=4 * args.samples,
        compare=("greedy", "random") if mode == "project" else (),
        seed=args.seed,
        runs=args.runs / f"{task}-{budget}-{mode}",
        output=args.runs / f"{task}-{budget}-{mode}.json",
        **TASKS[task],
    )


def found(config: SearchConfig) -> SearchResult:
    """The result of a search, if it was not made before by the same config and with the same weights."""
    assert config.output is not None
    path = config.output.with_suffix(".search.json")
    if path.exists():
        result = SearchResult.from_json(path.read_text())
        if result.config == config and result.model.weights == weights_digest(config.model):
            return result
    return search(config)


def speed(config: SearchConfig) -> dict[str, float]:
    """Candidates a second: a population in one call, and the same samples through the engine, one scheme at a time.

    The engine's figure flatters it: one engine answers for a uniform scheme all over again, though each candidate
    would need one of its own, which is compiled anew.
    """
    its = Search(dataclasses.replace(config, runs=None, warm_start="uniform", allocator="uniform", compare=()))
    space = its.space
    schemes = np.array(
        [space.project(row) for row in np.random.default_rng(0).random((4 * config.batch, space.layers))]
    )
    its.bench.judge("search", schemes)  # compiles
    began = time.perf_counter()
    its.bench.judge("search", schemes)
    together = len(schemes) / (time.perf_counter() - began)
    result = its.result()
    assert config.output is not None
    profile = config.output.with_suffix(".uniform.json")
    result.profile_of(space.uniform).save(profile, result.model)
    cases = its.bench.sets.search
    engine_config = EngineConfig(budgets=str(profile), room=config.room, max_model_len=config.length + config.room)
    began = time.perf_counter()
    with Engine.from_pretrained(config.model, engine_config) as engine:
        ready = time.perf_counter() - began
        prompts = [[*case.prompt, *case.tail[: -case.reply]] for case in cases]
        params = [
            SamplingParams(temperature=0.0, max_tokens=case.reply, ignore_eos=True, select_after=len(case.prompt))
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
        "seconds_until_an_engine_is_ready": ready,
        "samples": len(cases),
    }


def main(argv: list[str] | None = None) -> None:
    """Measures what searched budgets are worth, and how fast they are found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.budgets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path("models/kvjax_small"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--token-budgets", type=int, nargs="+", default=[16, 48, 128])
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and reply")
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument(
        "--samples", type=int, default=32, help="of the search set; 2 and 4 times as many of the others"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/budgets"))
    parser.add_argument("--output", type=pathlib.Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    results: list[SearchResult] = []
    for task in args.tasks:
        for budget in args.token_budgets:
            for mode in ("project", "paper"):
                results.append(found(settings(args, task, budget, mode)))
                Console().print(outcomes(results[-1]))
    measured = speed(settings(args, args.tasks[0], args.token_budgets[-1], "project"))
    Console().print(table(results))
    for name, value in measured.items():
        print(f"{name.replace('_', ' '):40s} {value:,.2f}")
    if args.output is not None:
        cells = [
            {
                "task": result.config.tasks,
                "token_budget": result.config.token_budget,
                "mode": result.config.mode,
                "chosen": result.chosen.name,
                "outcomes": plain(result.outcomes),
            }
            for result in results
        ]
        command = " ".join(["python -m benchmarks.budgets", *(sys.argv[1:] if argv is None else argv)])
        write_report(args.output, command, [*cells, measured], PACKAGES)


if __name__ == "__main__":
    main()
