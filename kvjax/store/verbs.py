"""Verbs of the store's commands: each does one thing to an open tier and returns the exit status."""

import argparse
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvjax.store.block import Blob, CorruptBlockError
from kvjax.store.bundle import BundleWriter, read_bundle
from kvjax.store.folder import Folder
from kvjax.store.keys import BlockKey
from kvjax.store.proof import read_block, read_header
from kvjax.store.sizes import show_size
from kvjax.store.status import GOOD, HARMED, UsageError, say
from kvjax.store.tier import Stored, Tier, TierError


def open_store(where: str) -> Tier:
    """Raises UsageError if nothing can be opened there."""
    try:
        if "://" in where:
            from kvjax.store.url import open_tier

            return open_tier(where, timeout=30.0)
        return Folder(Path(where))
    except Exception as error:  # of whichever library opens it
        raise UsageError(str(error) or type(error).__name__) from error


def _listing(tier: Tier) -> tuple[list[Stored], int]:
    """Every object, those used last first, and how many parts of the store cannot be listed, which are named."""
    everything = sorted(tier.scan(), key=lambda stored: (-stored.used, stored.key))
    problems = tier.problems if isinstance(tier, Folder) else []
    for problem in problems:
        say(problem)
    return everything, len(problems)


def _list(tier: Tier, args: argparse.Namespace) -> int:
    """list blocks, those used last first"""
    everything, harmed = _listing(tier)
    for index, stored in enumerate(everything):  # a line a block, for other programs to read
        problem = _header_problem(tier, stored)
        harmed += problem is not None
        if index < args.limit or problem is not None:
            line = f"{stored.key}  {show_size(stored.nbytes):>10}  {_ago(stored.used)}"
            say(line if problem is None else f"{line}  {problem}")
    if len(everything) > args.limit:
        say(f"and {len(everything) - args.limit:,} more (--limit)")
    return HARMED if harmed else GOOD


def _stat(tier: Tier, args: argparse.Namespace) -> int:
    """say how many blocks there are, of how many models, and how old"""
    everything, harmed = _listing(tier)
    blocks = []
    for stored in everything:
        problem = _header_problem(tier, stored)
        if problem is None:
            blocks.append(stored)
        else:
            say(f"{stored.key}: {problem}")
    harmed += len(everything) - len(blocks)
    table = Table(show_header=False, box=None)
    table.add_row("blocks", f"{len(blocks):,}")
    if harmed:
        table.add_row("harmed", f"{harmed:,} (verify says more)")
    table.add_row("tokens", f"{256 * len(blocks):,}")
    table.add_row("size", show_size(sum(stored.nbytes for stored in blocks)))
    if blocks:
        table.add_row("used last", _ago(blocks[0].used))
        table.add_row("unused longest", _ago(blocks[-1].used))
        sizes = {stored.nbytes for stored in blocks}
        table.add_row("formats", f"{len(sizes)} ({', '.join(show_size(size) for size in sorted(sizes))} a block)")
    Console(highlight=False, soft_wrap=True).print(table)
    return HARMED if harmed else GOOD


def _verify(tier: Tier, args: argparse.Namespace) -> int:
    """read every block and prove it"""
    everything, unlisted = _listing(tier)
    good = harmed = unread = left = 0
    for stored in everything:
        try:
            good += read_block(tier, stored) is not None
        except CorruptBlockError as error:
            harmed += 1
            if args.remove and (problem := _remove(tier, stored)):
                left += 1
                say(f"{stored.key}: {error}; not removed: {problem}")
            else:
                say(f"{stored.key}: {error}{'; removed' if args.remove else ''}")
        except Exception as error:  # which says nothing of the block: it stays
            unread += 1
            say(f"{stored.key}: cannot be read: {error}")
    unsaid = f", {unread:,} cannot be read" if unread else ""
    say(f"{good:,} blocks are good, {harmed:,} are harmed{unsaid}")
    return HARMED if unlisted or unread or left or (harmed and not args.remove) else GOOD


def _gc(tier: Tier, args: argparse.Namespace) -> int:
    """remove the blocks that were not used for longest"""
    if args.size is None and args.older_than is None:
        raise UsageError("gc needs --size or --older-than")
    everything, failed = _listing(tier)
    if args.older_than is not None and any(not stored.used for stored in everything):
        raise UsageError("this store does not say when a block was used: --older-than would remove all of them")
    if args.size is not None and everything and not any(stored.nbytes for stored in everything):
        raise UsageError("this store does not say how large its blocks are: --size cannot be kept to")
    retained = removed = 0
    for stored in everything:
        old = args.older_than is not None and time.time() - stored.used > args.older_than
        if not old and (args.size is None or retained + stored.nbytes <= args.size):
            retained += stored.nbytes
        elif problem := _remove(tier, stored):
            failed += 1
            retained += stored.nbytes
            say(f"{stored.key}: not removed: {problem}")
        else:
            removed += 1
    say(f"removed {removed:,} blocks; {len(everything) - removed:,} of {show_size(retained)} are left")
    return HARMED if failed else GOOD


def _purge(tier: Tier, args: argparse.Namespace) -> int:
    """remove every block"""
    everything, failed = _listing(tier)
    if not args.yes:
        try:
            answer = input(f"remove {len(everything):,} blocks? [y/N] ")
        except EOFError:
            raise UsageError("nobody answers: purge --yes does not ask") from None
        if answer.strip().lower() != "y":
            say("nothing was removed")
            return HARMED
    removed = 0
    for stored in everything:
        problem = _remove(tier, stored)
        removed += problem is None
        if problem is not None:
            failed += 1
            say(f"{stored.key}: not removed: {problem}")
    say(f"removed {removed:,} blocks")
    return HARMED if failed else GOOD


def _export(tier: Tier, args: argparse.Namespace) -> int:
    """write every good block to a tar file"""
    everything, skipped = _listing(tier)
    count = 0
    try:
        with BundleWriter(args.file) as bundle:
            for stored in everything:
                try:
                    proven = read_block(tier, stored)
                except Exception as error:
                    say(f"{stored.key}: left out: {error}")
                    skipped += 1
                    continue
                if proven is not None:
                    bundle.add(stored.key, proven[0], stored.used)
                    count += 1
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{args.file} cannot be written: {error.strerror or error}") from error
    say(f"wrote {count:,} blocks to {args.file}")
    return HARMED if skipped else GOOD


def _import(tier: Tier, args: argparse.Namespace) -> int:
    """take the blocks of a tar file, each of which is proven first"""
    taken: set[str] = set()
    refused = 0
    try:
        for member in read_bundle(args.file):
            problem = member.problem
            if member.key is not None and member.blob is not None:
                problem = "it comes twice" if member.name in taken else _take(tier, member.key, member.blob)
            if problem:
                refused += 1
                say(f"{member.name[:80]}: refused: {problem}" if member.name else f"{args.file}: {problem}")
            else:
                taken.add(member.name)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UsageError(f"{args.file} cannot be read: {error.strerror or error}") from error
    say(f"took {len(taken):,} blocks from {args.file}")
    return HARMED if refused else GOOD


def _take(tier: Tier, key: BlockKey, blob: Blob) -> str:
    """Stores a proven block, in place of a harmed one; returns why it could not, "" if it could."""
    try:
        if isinstance(tier, Folder):
            with contextlib.suppress(CorruptBlockError):
                if read_block(tier, Stored(key.hex, blob.nbytes)) is not None:
                    return ""
            tier.delete(key.hex)
        parent = ""
        with contextlib.suppress(TierError):
            parent = key.parent.hex() if tier.contains(key.parent.hex()) else ""
        tier.write(key.hex, memoryview(blob), parent)
    except Exception as error:
        return f"it cannot be stored: {error}"
    return ""


def _header_problem(tier: Tier, stored: Stored) -> str | None:
    """What is wrong with an object, as far as its header says. Only of a folder: elsewhere each would be a request."""
    if not isinstance(tier, Folder):
        return None
    try:
        read_header(tier, stored)
    except (TierError, CorruptBlockError) as error:
        return str(error)
    return None


def _remove(tier: Tier, stored: Stored) -> str | None:
    """Removes an object; returns why it could not, None if it could."""
    try:
        tier.delete(stored.key)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def _ago(used: float) -> str:
    if not used:
        return "-"
    seconds = max(time.time() - used, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


VERBS: Mapping[str, Callable[[Tier, argparse.Namespace], int]] = {
    "ls": _list,
    "stat": _stat,
    "verify": _verify,
    "gc": _gc,
    "purge": _purge,
    "export": _export,
    "import": _import,
}
