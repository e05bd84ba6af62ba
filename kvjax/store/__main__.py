"""`python -m kvjax.store`: look into a store's folder or bucket, prove it, thin it out, carry it elsewhere.

exit status: 0 all is well; 1 something is harmed, cannot be read or was left as it is; 2 a wrong call.
"""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kvjax.store.sizes import memory
from kvjax.store.status import GOOD, HARMED, WRONG, UsageError, fail
from kvjax.store.tier import TierError

OLDEST = 100 * 365 * 86400.0  # seconds: an age beyond this is a mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. Whatever lies in a store ends in a sentence."""
    args = _parser().parse_args(argv)
    try:
        from kvjax.store import verbs  # NumPy and what draws tables

        with contextlib.closing(verbs.open_store(args.where)) as tier:
            status = verbs.VERBS[args.verb](tier, args)
            sys.stdout.flush()
            return status
    except UsageError as error:
        return fail(WRONG, str(error))
    except TierError as error:
        return fail(WRONG if error.reason == "refused" else HARMED, str(error))
    except BrokenPipeError:  # as of `ls | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except Exception as error:
        return fail(HARMED, f"{type(error).__name__}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m kvjax.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, purpose: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=purpose, description=purpose)
        made.add_argument("where", metavar="STORE", help="a folder given to --disk-cache, or a URL to --remote-cache")
        made.set_defaults(verb=name)
        return made

    ls = command("ls", "list blocks, those used last first")
    ls.add_argument("--limit", type=_count, default=20, help="most blocks to show (default: 20)")
    command("stat", "say how many blocks there are, of how many models, and how old")
    verify = command("verify", "read every block and prove it")
    verify.add_argument("--remove", action="store_true", help="remove what is harmed")
    gc = command("gc", "remove the blocks that were not used for longest")
    gc.add_argument("--size", type=_size, help="keep at most so much, e.g. 20GiB")
    gc.add_argument("--older-than", type=_age, metavar="AGE", help="remove what was not used for so long, e.g. 7d, 12h")
    command("purge", "remove every block").add_argument("--yes", action="store_true", help="do not ask")
    export = command("export", "write every good block to a tar file")
    export.add_argument("file", type=Path, help="a tar file to write")
    taken = command("import", "take the blocks of a tar file, each of which is proven first")
    taken.add_argument("file", type=Path, help="a tar file that export has written")
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number like 20")
    return int(text)


def _size(text: str) -> int:
    try:
        size = memory(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size:
        raise argparse.ArgumentTypeError("a size of 0 removes everything: that is what purge does")
    return size


def _age(text: str) -> float:
    """Seconds of '7d', '12h', '30m' or '45s'."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    try:
        age = float(text[:-1]) * units[text[-1]]
    except (KeyError, ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not an age like 7d, 12h, 30m or 45s") from None
    if not (0 < age <= OLDEST and math.isfinite(age)):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no age: above 0 s, and 100 years (36500d) at most")
    return age


if __name__ == "__main__":
    sys.exit(main())
