"""`python -m kvjax.eval`: evaluates a model on tasks. JAX is imported after the arguments are checked."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import kvjax
from kvjax.eval.arguments import ArgumentError, Arguments, parse
from kvjax.eval.catalogue import catalogue, specimen
from kvjax.eval.command_target import open_target
from kvjax.eval.plan import Plan, fingerprint, with_metrics
from kvjax.eval.record import Journal, JournalError, Record
from kvjax.eval.report import ProgressReport, cache_lines, error_lines, pace_lines, table
from kvjax.eval.runner import Case, evaluate
from kvjax.eval.summary import Summary
from kvjax.eval.targets import Target, TargetError
from kvjax.eval.tasks import TASKS

WIDE = 200  # columns where no terminal bounds them
MEASURED = 10_000  # columns; no table has more


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates; returns the exit status."""
    given = parse(sys.argv[1:] if arguments is None else arguments)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    log = Console(stderr=True, highlight=False, soft_wrap=True)
    if given.list or given.show:
        out.print(specimen(given.show) if given.show else catalogue(TASKS.values()))
        return 0
    try:
        with contextlib.ExitStack() as resources:
            return run(given, out, log, resources)
    except (ArgumentError, JournalError, TargetError) as error:
        print(f"kvjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"kvjax: cannot write: {error}", file=sys.stderr)
        return 1


def run(given: Arguments, out: Console, log: Console, resources: contextlib.ExitStack) -> int:
    """Evaluates the samples that the journal lacks, and prints the summary of all."""
    tasks, left_out = with_metrics(given)
    for line in left_out:
        log.print(line, markup=False)
    target, start = open_target(given, resources)
    plan = Plan.of(given, tasks, target.max_model_len)
    settings = settings_of(given, target)
    journal = resources.enter_context(Journal(Path(given.output), settings)) if given.output else None
    cases = plan.cases
    earlier = journal.records if journal else {}
    done = [earlier[case.key] for case in cases if case.key in earlier and earlier[case.key].error is None]
    keys = {record.key for record in done}
    left = [case for case in cases if case.key not in keys]
    if done:
        log.print(f"{len(done)} of {len(cases)} samples are in {given.output} already")
    records, interrupted = evaluate_cases(target, start, left, done, given, journal, log)
    summary = Summary.of(records, plan.keys, len(cases))
    text = json.dumps(summary.to_json(settings), indent=1)
    if given.output:
        Path(given.output).with_suffix(".summary.json").write_text(text + "\n")
    if given.json:
        print(text)
    else:
        drawn = "greedy" if given.conduct.temperature == 0 else f"temperature {given.conduct.temperature:g}"
        modes = (("question hidden", given.conduct.query_agnostic), ("evicted", given.conduct.evict))
        heading = ", ".join([given.conduct.form, drawn, *(mode for mode, on in modes if on), str(plan)])
        out.print(f"\n  [bold]{target.name}[/bold]  {heading}")
        shown = table(summary)
        # rather lines that a narrow terminal wraps than numbers that are cut
        out.width = max(out.width, out.measure(shown, options=out.options.update(max_width=MEASURED)).maximum)
        out.print(shown, *cache_lines(target, summary.lengths), *pace_lines(summary), "", sep="\n")
    for line in error_lines(summary):
        log.print(line)
    if given.show_retained is not None and not interrupted:
        from kvjax.eval.retained.render import show_retained

        show_retained(target, start, plan, given, log if given.json else out)
    if (interrupted or summary.failed or summary.missing) and given.output:
        log.print("Run the same command again to evaluate the missing samples.")
    return 130 if interrupted else 1 if summary.failed or summary.missing else 0


def settings_of(given: Arguments, target: Target) -> dict[str, Any]:
    """Everything that a score depends on beside its task, length and index."""
    settings = {
        **target.identity,
        "form": given.conduct.form,
        "seed": given.conduct.seed,
        "temperature": given.conduct.temperature,
        "kvjax": kvjax.__version__,
    }
    settings |= {name: True for name in ("query_agnostic", "evict") if getattr(given.conduct, name)}
    if given.data:
        settings["data"] = {data.name: fingerprint(data) for data in given.data}
    return settings


def evaluate_cases(
    target: Target,
    start: Callable[[], None],
    left: Sequence[Case],
    done: Sequence[Record],
    given: Arguments,
    journal: Journal | None,
    log: Console,
) -> tuple[list[Record], bool]:
    """The records of all cases that were evaluated, and whether an interrupt ended it."""
    records = list(done)
    try:
        if left:
            with log.status(f"starting {target.name}"):
                start()
        with ProgressReport(log, done, len(done) + len(left)) as progress:

            def on_record(record: Record) -> None:
                if journal:
                    journal.append(record)
                records.append(record)
                progress.add(record)

            evaluate(target, left, given.conduct, on_record)
    except KeyboardInterrupt:
        return records, True
    return records, False


if __name__ == "__main__":
    sys.exit(main())
