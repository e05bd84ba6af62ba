"""`python -m kvjax.eval`: reads the arguments, and only then imports what answering needs."""

import contextlib
import dataclasses
import importlib.resources
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

import kvjax
from kvjax.eval.arguments import ArgumentError, Arguments, parse
from kvjax.eval.catalogue import catalogue, specimen
from kvjax.eval.metrics import METRICS
from kvjax.eval.record import Journal, JournalError, Record
from kvjax.eval.report import Watch, error_lines, pace_lines, table
from kvjax.eval.runner import Case, evaluate
from kvjax.eval.summary import Summary
from kvjax.eval.target import Target, TargetError
from kvjax.eval.tasks import TASKS, Task

MARGIN = 1024  # tokens beyond the longest sample, for answers longer than the right ones
SMALL_MODEL = "kvjax_small"
WIDE = 200  # columns of a table that no terminal bounds


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit status."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    if given.list or given.show:
        out.print(specimen(given.show) if given.show else catalogue(TASKS.values()))
        return 0
    try:
        given = dataclasses.replace(given, tasks=with_metrics(given, log))
        with contextlib.ExitStack() as resources:
            return run(given, out, log, resources)
    except (ArgumentError, JournalError, TargetError) as error:
        print(f"kvjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kvjax: cannot write: {error}", file=sys.stderr)
        return 1


def run(given: Arguments, out: Console, log: Console, resources: contextlib.ExitStack) -> int:
    """Asks what is not answered yet, and prints what all answers amount to."""
    target, start = open_target(given, resources)
    longest = max(given.lengths)
    if target.max_model_len is not None and longest > target.max_model_len:
        raise ArgumentError(f"--lengths {longest} is more than the {target.max_model_len} tokens of {target.name}")
    settings = {
        **target.identity,
        "form": given.conduct.form,
        "seed": given.conduct.seed,
        "temperature": given.conduct.temperature,
        "kvjax": kvjax.__version__,
    }
    journal = resources.enter_context(Journal(Path(given.output), settings)) if given.output else None
    # index by index, so that a run that is interrupted has something of every cell
    cases = [
        Case(task, length, index) for index in range(given.samples) for task in given.tasks for length in given.lengths
    ]
    known = journal.records if journal else {}
    done = [known[case.key] for case in cases if case.key in known and known[case.key].error is None]
    keys = {record.key for record in done}
    left = [case for case in cases if case.key not in keys]
    if done:
        log.print(f"{len(done)} of {len(cases)} samples are in {given.output} already")
    records, interrupted = ask(target, start, left, done, given, journal, log)
    summary = Summary.of(records, [(task.name, length) for task in given.tasks for length in given.lengths], len(cases))
    shown = {**settings, "samples": given.samples}
    if given.output:
        path = Path(given.output).with_suffix(".summary.json")
        path.write_text(json.dumps(summary.to_json(shown), indent=1) + "\n")
    if given.json:
        print(json.dumps(summary.to_json(shown), indent=1))
    else:
        drawn = "greedy" if given.conduct.temperature == 0 else f"temperature {given.conduct.temperature:g}"
        out.print(f"\n  [bold]{target.name}[/bold]  {given.conduct.form}, {drawn}, {given.samples} samples a cell")
        out.print(table(summary), *pace_lines(summary), "", sep="\n")
    for line in error_lines(summary):
        log.print(line)
    if (interrupted or summary.failed or summary.missing) and given.output:
        log.print("Run the same command again to ask what is missing.")
    return 130 if interrupted else 1 if summary.failed or summary.missing else 0


def ask(
    target: Target,
    start: Callable[[], None],
    left: Sequence[Case],
    done: Sequence[Record],
    given: Arguments,
    journal: Journal | None,
    log: Console,
) -> tuple[list[Record], bool]:
    """The records of all cases that could be asked, and whether someone interrupted it."""
    records = list(done)
    try:
        if left:
            with log.status(f"starting {target.name}"):
                start()
        with Watch(log, done, len(done) + len(left)) as watch:

            def on_record(record: Record) -> None:
                if journal:
                    journal.append(record)
                records.append(record)
                watch.saw(record)

            evaluate(target, left, given.conduct, on_record)
    except KeyboardInterrupt:
        return records, True
    return records, False


def open_target(given: Arguments, resources: contextlib.ExitStack) -> tuple[Target, Callable[[], None]]:
    """The target and what starts it, which is left for when there is something to ask."""
    if given.url is not None:
        from kvjax.eval.target_openai import OpenAITarget

        remote = OpenAITarget(
            given.url,
            model=given.model,
            api_key=given.api_key,
            tokenizer=given.tokenizer,
            timeout=given.timeout,
        )
        resources.callback(remote.close)
        return remote, lambda: None
    folder = Path(given.model).expanduser() if given.model else small_model()
    if not (folder / "config.json").is_file():
        raise ArgumentError(f"--model {str(folder)!r} is no folder with a config.json: no model is in it")
    keep_compiled(given.compile_cache)
    from kvjax.models import read_config

    try:
        most = read_config(folder).max_position
    except (ValueError, OSError, NotImplementedError) as error:
        raise TargetError(f"{folder}: {error}") from error
    length = given.max_model_len or min(max(given.lengths) + MARGIN, most)
    for flag, tokens, bound in (("--max-model-len", length, most), ("--lengths", max(given.lengths), length)):
        if tokens > bound:
            raise ArgumentError(f"{flag} {tokens} is more than the {bound} tokens of context of {folder.name}")
    from kvjax.engine import EngineConfig
    from kvjax.eval.target_engine import EngineTarget

    config = EngineConfig(max_model_len=length, max_num_seqs=given.conduct.concurrency)
    local = EngineTarget.from_pretrained(folder, config)

    def start() -> None:
        try:
            resources.enter_context(local.engine)
        except (ValueError, OSError, NotImplementedError) as error:
            raise TargetError(f"{folder}: {error}") from error

    return local, start


def with_metrics(given: Arguments, log: Console) -> tuple[Task, ...]:
    """The tasks that can be scored here: by default those, but a task that was asked for must be.

    Raises:
        ArgumentError: a package is missing that scoring needs.
    """
    tasks = []
    for task in given.tasks:
        try:
            METRICS[task.metric]("1", ("1",))
        except ImportError as error:
            if not given.all_by_default:
                raise ArgumentError(f"{task.name}: {error}") from error
            log.print(f"{task.name} is left out: {error}", markup=False)
        else:
            tasks.append(task)
    return tuple(tasks)


def small_model() -> Path:
    """The folder of the model that ships with kvjax."""
    return Path(str(importlib.resources.files("kvjax") / "models" / SMALL_MODEL))


def keep_compiled(folder: str) -> None:
    """Has JAX keep what it compiles in `folder`, unless it is 'none' or JAX's own variables say otherwise."""
    if folder == "none":
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        print(f"kvjax: no compile cache in {path}: {error.strerror}; this run compiles anew", file=sys.stderr)
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(path))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


if __name__ == "__main__":
    sys.exit(main())
