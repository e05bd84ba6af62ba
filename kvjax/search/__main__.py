"""`python -m kvjax.search --config configs/search/needles.yaml`: finds budgets and writes a profile that serves."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import yaml
from rich.console import Console

from kvjax.search.config import SearchConfig, from_fields
from kvjax.search.outcome import FULL
from kvjax.search.report.tables import outcomes, table
from kvjax.search.result import SearchResult
from kvjax.search.run import search


def main(argv: list[str] | None = None) -> None:
    """Finds how many tokens each layer keeps for a task. Ctrl-C saves; the same command goes on from there."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.search", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML with fields of SearchConfig")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        nargs="+",
        default=[],
        help="fields to use instead of the file's, such as token_budget=64 or tasks=[mini/vt]; "
        f"there are {', '.join(field.name for field in dataclasses.fields(SearchConfig))}",
    )
    parser.add_argument("--fresh", action="store_true", help="delete the checkpoints of an interrupted search")
    args = parser.parse_args(argv)
    try:
        config = _read(args.config, args.set)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
    given = sys.argv[1:] if argv is None else argv
    command = f"python -m kvjax.search {shlex.join(word for word in given if word != '--fresh')}"
    try:
        result = search(config, fresh=args.fresh, made_by=command)
    except KeyboardInterrupt:
        retained = "the same command goes on from there" if config.runs else "runs is not set, so nothing was saved"
        print(f"\nstopped: {retained}", file=sys.stderr)
        raise SystemExit(130) from None
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    Console().print(outcomes(result))
    if config.expand:
        Console().print(table([_briefly(each, result.chosen.name) for each in result.sweep]))
    if config.output is not None:
        print(f"wrote {config.output}: python -m kvjax.serve {config.model} --budgets {config.output}")


def _briefly(result: SearchResult, chosen: str) -> SearchResult:
    """The outcomes that every token budget has: the full cache, uniform budgets and the chosen one."""
    names = (FULL, "uniform", chosen)
    return dataclasses.replace(result, outcomes=tuple(each for each in result.outcomes if each.name in names))


def _read(path: Path, changes: list[str]) -> SearchConfig:
    fields = yaml.safe_load(path.read_text())
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has no fields: it is a {type(fields).__name__}")
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} sets nothing: write NAME=VALUE")
        fields[name] = yaml.safe_load(value)
    return from_fields(fields)


if __name__ == "__main__":
    main()
