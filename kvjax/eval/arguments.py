"""The command line of `python -m kvjax.eval`, checked as far as possible before heavy imports."""

import argparse
import difflib
import fnmatch
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import kvjax
from kvjax.eval.catalogue import several_turns
from kvjax.eval.datasets import LOADERS, DataSet, load
from kvjax.eval.runner import SEEDS, Conduct
from kvjax.eval.tasks import TASKS, Task

DEFAULT_TASKS = ("mini/*",)
KINDS = tuple(LOADERS)
# Options of an engine in this process; a server has its own.
IN_PROCESS = ("method", "token_budget", "budgets", "headroom", "query_agnostic", "evict", "show_retained")
TERMINAL = "-"
COMPILE_CACHE = "~/.cache/kvjax/compiled"


class ArgumentError(ValueError):
    """A wrong setting; the message is for its author."""


@dataclass(frozen=True)
class Arguments:
    """Attributes, each with a flag of its name (`python -m kvjax.eval --help`):

    model: a folder, or a server's name for it; None for the model that ships, or the server's first.
    url: of a server; None evaluates `model` in this process.
    method, token_budget, budgets, headroom: the cache's compression, as in `EngineConfig`; None for its defaults.
    tasks: generated tasks, `all_by_default` if they were not named; `data`: data sets of files.
    lengths: in tokens; empty for the default, which is the model's context for files.
    samples: of each task at each length; None for the default, which is all for files.
    output: of the samples, JSON Lines; None writes none.
    show_retained: a file for the figure of the retained tokens; `TERMINAL` for no file, None for no figure.
    show: a task of which to show a sample; `list`: show all tasks. Neither evaluates.
    """

    model: str | None
    url: str | None
    api_key: str | None
    tokenizer: str | None
    max_model_len: int | None
    method: str | None
    token_budget: int | None
    budgets: str | None
    headroom: int | None
    timeout: float
    compile_cache: str
    tasks: tuple[Task, ...]
    all_by_default: bool
    data: tuple[DataSet, ...]
    lengths: tuple[int, ...]
    samples: int | None
    conduct: Conduct
    output: str | None
    json: bool
    show_retained: str | None
    list: bool
    show: Task | None


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Arguments:
    """Reads the command line. Ends the process with status 2 and a sentence if anything is wrong."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        return _checked(given, environment)
    except ValueError as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvjax.eval",
        usage="%(prog)s [--model FOLDER | --url URL] [--tasks NAME ...] [--lengths TOKENS ...] [flags]",
        description="Score a model on long-context tasks: in this process, or behind any server with the OpenAI API.",
        epilog="Exit status: 0 all samples have a score, 1 some failed or were not evaluated, 2 a flag is wrong, "
        "130 interrupted; run the same command with --output again to go on.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvjax {kvjax.__version__}")

    target = parser.add_argument_group("model")
    target.add_argument(
        "--model",
        metavar="FOLDER",
        help="a model in the Hugging Face format (default: the small one that ships with kvjax); "
        "with --url, the server's name for it (default: its first)",
    )
    target.add_argument("--url", help="a server, as http://localhost:8000; needs openai")
    target.add_argument("--api-key", metavar="KEY", help="for the server (default: $OPENAI_API_KEY, which `ps` hides)")
    target.add_argument("--tokenizer", metavar="FOLDER", help="counts tokens if the server has no /tokenize")
    target.add_argument(
        "--max-model-len",
        metavar="TOKENS",
        type=int,
        help="of prompt and answer (default: the server's, or the longest of --lengths and 1024 more)",
    )
    target.add_argument("--timeout", metavar="SECONDS", type=float, default=600.0, help="of a request (default: 600)")
    target.add_argument(
        "--compile-cache",
        metavar="DIR",
        default=COMPILE_CACHE,
        help=f"keep compiled steps here for later runs; none: do not (default: {COMPILE_CACHE})",
    )

    cache = parser.add_argument_group("KV cache compression, of a model in this process")
    cache.add_argument(
        "--method", metavar="NAME", help="as rocketkv (default with a budget) or snapkv; full: not at all"
    )
    cache.add_argument(
        "--token-budget", metavar="TOKENS", type=int, help="KV pairs a step reads, of each layer and head"
    )
    cache.add_argument("--budgets", metavar="FILE", help="a budget for each layer, instead of --token-budget")
    cache.add_argument(
        "--headroom", metavar="TOKENS", type=int, help="of a view, free for generated tokens (default: 128)"
    )
    cache.add_argument(
        "--query-agnostic", action="store_true", help="choose retained tokens before the question is read"
    )
    cache.add_argument(
        "--evict",
        action="store_true",
        help="tasks of several turns: tokens not retained in the first are gone (default: each turn chooses anew)",
    )

    samples = parser.add_argument_group("tasks and samples")
    samples.add_argument(
        "--tasks",
        metavar="NAME",
        nargs="+",
        help="names or patterns, as mini/vt or 'ruler/niah_*' (default: 'mini/*'); --list shows all",
    )
    samples.add_argument(
        "--lengths",
        metavar="TOKENS",
        nargs="+",
        type=int,
        default=(),
        help="of each sample with its answers (default: 512; for --data what the model takes)",
    )
    samples.add_argument(
        "--data",
        metavar="KIND:FILE",
        action="append",
        default=[],
        help="a file of a published benchmark, as ruler:niah_single_1.jsonl; may repeat "
        f"(kinds: {', '.join(KINDS)}); without --tasks nothing else is evaluated",
    )
    samples.add_argument(
        "--samples",
        metavar="N",
        type=int,
        help="of each task at each length (default: 20, for --data all)",
    )
    samples.add_argument("--seed", metavar="N", type=int, default=0, help="of the samples (default: 0)")
    samples.add_argument(
        "--form",
        choices=("completion", "chat"),
        default="completion",
        help="completion: the prompt ends in the beginning of the answer (default); chat: through the chat template",
    )
    samples.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default)")

    run = parser.add_argument_group("run and results")
    run.add_argument("--output", metavar="FILE.jsonl", help="write each sample here, and resume an interrupted run")
    run.add_argument("--concurrency", metavar="N", type=int, default=4, help="samples in flight at once (default: 4)")
    run.add_argument("--json", action="store_true", help="print the summary as JSON instead of the table")

    run.add_argument(
        "--show-retained",
        metavar="FILE.png",
        nargs="?",
        const=TERMINAL,
        help="draw the retained tokens of each task's first sample, here or in a file (needs matplotlib)",
    )

    listing = parser.add_argument_group("task catalogue, without an evaluation")
    listing.add_argument("--list", action="store_true", help="list the tasks, each with one of its questions")
    listing.add_argument("--show", metavar="NAME", help="show a sample of a task")
    return parser


def _checked(given: argparse.Namespace, environment: Mapping[str, str]) -> Arguments:
    for name in ("tokenizer", "api_key"):
        if getattr(given, name) is not None and given.url is None:
            raise ArgumentError(f"--{name.replace('_', '-')} is for a server: give --url as well")
    for name in IN_PROCESS:
        if getattr(given, name) not in (None, False) and given.url is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ArgumentError(f"{flag} is for an engine in this process, not for --url: leave one of them out")
    for name in ("samples", "timeout", "max_model_len"):
        if getattr(given, name) is not None and not getattr(given, name) > 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(given, name)} must be more than 0")
    if given.samples is not None and given.samples > SEEDS:
        raise ArgumentError(f"--samples {given.samples} is more than the {SEEDS:,} of one seed: use several --seed")
    if given.lengths and min(given.lengths) < 1:
        raise ArgumentError(f"--lengths {min(given.lengths)} must be at least 1 token")
    if given.show_retained not in (None, TERMINAL):
        if not given.show_retained.endswith(".png"):
            raise ArgumentError(f"--show-retained {given.show_retained!r} is drawn as a PNG: end its name in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise ArgumentError('--show-retained with a file needs matplotlib: pip install "kvjax[train]"')
    tasks, data = select(given.tasks or (() if given.data else DEFAULT_TASKS)), read_data(given.data)
    if given.evict and not any(several_turns(task) for task in (*tasks, *data)):
        raise ArgumentError("--evict tells in later turns, and no task has any: leave it out, or add 'mini/turns_*'")
    unchanged = {field.name: getattr(given, field.name) for field in fields(Arguments) if hasattr(given, field.name)}
    conduct = {field.name: getattr(given, field.name) for field in fields(Conduct)}
    checked = {
        "api_key": given.api_key or environment.get("OPENAI_API_KEY"),
        "budgets": given.budgets and os.path.expanduser(given.budgets),
        "tasks": tasks,
        "all_by_default": given.tasks is None,
        "data": data,
        "lengths": tuple(dict.fromkeys(given.lengths)),
        "conduct": Conduct(**conduct),
        "show": select([given.show])[0] if given.show else None,
    }
    return Arguments(**(unchanged | checked))


def read_data(named: Sequence[str]) -> tuple[DataSet, ...]:
    """The data sets of `KIND:FILE` each; their names begin with `data/`, apart from generated tasks.

    Raises:
        ArgumentError: there is no such kind, no such file, or its content is of another kind.
    """
    if not named:
        return ()
    sets: dict[str, DataSet] = {}
    for text in named:
        kind, colon, path = text.partition(":")
        if not colon or kind not in KINDS:
            raise ArgumentError(f"--data {text!r}: write it as KIND:FILE; kinds are {', '.join(KINDS)}")
        try:
            loaded = load(kind, Path(path).expanduser())
        except (OSError, ValueError, ImportError) as error:
            raise ArgumentError(f"--data {text}: {error}") from error
        data = replace(loaded, name=f"data/{loaded.name}")
        if data.name in sets:
            raise ArgumentError(f"--data has two files of {data.name}: evaluate one after the other")
        sets[data.name] = data
    return tuple(sets.values())


def select(patterns: Sequence[str], tasks: Mapping[str, Task] = TASKS) -> tuple[Task, ...]:
    """The tasks that match any of the names or patterns, each once.

    Raises:
        ArgumentError: a pattern matches nothing; the message has the nearest names.
    """
    selected: dict[str, Task] = {}
    for pattern in patterns:
        names = [name for name in tasks if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            near = difflib.get_close_matches(pattern, [*tasks, *(name.split("/")[-1] for name in tasks)], n=2)
            near = [name for name in tasks if name in near or name.split("/")[-1] in near]
            hint = f"did you mean {' or '.join(near)}?" if near else "--list shows all tasks"
            raise ArgumentError(f"no task matches {pattern!r}; {hint}")
        selected |= {name: tasks[name] for name in names}
    return tuple(selected.values())
