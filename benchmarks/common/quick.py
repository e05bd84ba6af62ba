"""Command line that benchmarks share: `--quick` rehearses at toy sizes, `--output` writes the results."""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any


def build_parser(
    module: str, description: str | None, numbers: Mapping[str, tuple[int, str]]
) -> argparse.ArgumentParser:
    """A parser with a flag for each of `numbers`: its name, its default and what it means."""
    parser = argparse.ArgumentParser(
        f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Parses with both flags added.

    Args:
        arguments: None for those of the process.
        quick: defaults that `--quick` puts in place of the parser's; what is given on the command line still wins.
    """
    parser.add_argument("--quick", action="store_true", help="toy sizes: a rehearsal, whose figures mean nothing")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE.json")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide a result."""
    return {name: value for name, value in vars(args).items() if name != "output"}
