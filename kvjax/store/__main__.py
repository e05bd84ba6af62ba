"""`python -m kvjax.store`: look into a store's folder or bucket, prove it, thin it out, carry it elsewhere."""

import argparse
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvjax.store.block import BlockLayout, CorruptBlockError
from kvjax.store.disk import DiskTier
from kvjax.store.keys import FORMAT
from kvjax.store.sizes import memory, show_size
from kvjax.store.tier import Stored, Tier, TierError

MOST_BLOCK = 4 << 30  # bytes: what claims to be larger is no block


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 if something is harmed or missing, 2 for a wrong call."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
        tier = _open(args.where)
    except (TierError, ValueError, ImportError) as error:
        print(f"kvjax.store: {error}", file=sys.stderr)
        return 2
    try:
        return args.run(tier, args, console)
    except TierError as error:
        print(f"kvjax.store: {error}", file=sys.stderr)
        return 1
    finally:
        tier.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kvjax.store", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Tier, argparse.Namespace, Console], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        made.add_argument("where", metavar="STORE", help="a folder given to --disk-cache, or a URL to --remote-cache")
        made.set_defaults(run=run)
        return made

    command("ls", _list).add_argument("--limit", type=int, default=20, help="most blocks to show (default: 20)")
    command("stat", _stat)
    command("verify", _verify).add_argument("--remove", action="store_true", help="remove what is harmed")
    gc = command("gc", _gc)
    gc.add_argument("--size", type=_size, help="keep at most so much, e.g. 20GiB")
    gc.add_argument("--older-than", type=_age, metavar="AGE", help="remove what was not used for so long, e.g. 7d, 12h")
    command("purge", _purge).add_argument("--yes", action="store_true", help="do not ask")
    command("export", _export).add_argument("file", type=Path, help="a tar file to write")
    command("import", _import).add_argument("file", type=Path, help="a tar file that export has written")
    return parser


def _open(where: str) -> Tier:
    if "://" in where:
        from kvjax.store.url import open_tier

        return open_tier(where, timeout=30.0)
    if not (Path(where) / FORMAT).is_dir():
        raise ValueError(f"{where} is not the folder of a disk cache: there is no {FORMAT} in it")
    return DiskTier(Path(where), 1 << 62, least_free=0)


def _newest_first(tier: Tier) -> list[Stored]:
    return sorted(tier.scan(), key=lambda stored: (-stored.used, stored.key))


def _list(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """list blocks, those used last first"""
    everything = _newest_first(tier)
    for stored in everything[: args.limit]:  # a line a block, for other programs to read
        console.print(f"{stored.key}  {show_size(stored.nbytes):>10}  {_ago(stored.used)}")
    if len(everything) > args.limit:
        console.print(f"and {len(everything) - args.limit:,} more (--limit)")
    return 0


def _stat(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """say how many blocks there are, of how many models, and how old"""
    everything = _newest_first(tier)
    table = Table(show_header=False, box=None)
    table.add_row("blocks", f"{len(everything):,}")
    table.add_row("tokens", f"{256 * len(everything):,}")
    table.add_row("size", show_size(sum(stored.nbytes for stored in everything)))
    if everything:
        table.add_row("used last", _ago(everything[0].used))
        table.add_row("unused longest", _ago(everything[-1].used))
        sizes = {stored.nbytes for stored in everything}
        table.add_row("formats", f"{len(sizes)} ({', '.join(show_size(size) for size in sorted(sizes))} a block)")
    console.print(table)
    return 0


def _verify(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """read every block and prove it"""
    good = harmed = 0
    for stored in tier.scan():
        problem = _problem(tier, stored)
        if problem is None:
            good += 1
            continue
        harmed += 1
        console.print(f"{stored.key}: {problem}{'; removed' if args.remove else ''}")
        if args.remove:
            tier.delete(stored.key)
    console.print(f"{good:,} blocks are good, {harmed:,} are harmed")
    return 1 if harmed and not args.remove else 0


def _gc(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """remove the blocks that were not used for longest"""
    if args.size is None and args.older_than is None:
        raise TierError("refused", "gc needs --size or --older-than")
    everything = _newest_first(tier)
    retained = removed = 0
    for stored in everything:
        old = args.older_than is not None and time.time() - stored.used > args.older_than
        if old or (args.size is not None and retained + stored.nbytes > args.size):
            tier.delete(stored.key)
            removed += 1
        else:
            retained += stored.nbytes
    console.print(f"removed {removed:,} blocks; {len(everything) - removed:,} of {show_size(retained)} are left")
    return 0


def _purge(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """remove every block"""
    everything = list(tier.scan())
    if not args.yes and input(f"remove {len(everything):,} blocks? [y/N] ").strip().lower() != "y":
        console.print("nothing was removed")
        return 1
    for stored in everything:
        tier.delete(stored.key)
    console.print(f"removed {len(everything):,} blocks")
    return 0


def _export(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """write every good block to a tar file"""
    count = skipped = 0
    with tarfile.open(args.file, "w") as bundle:
        for stored in tier.scan():
            try:
                blob = _read(tier, stored)
                BlockLayout.read(blob)
            except (TierError, CorruptBlockError) as error:
                console.print(f"{stored.key}: left out: {error}")
                skipped += 1
                continue
            member = tarfile.TarInfo(stored.key)
            member.size, member.mode, member.mtime = blob.nbytes, 0o600, int(stored.used)
            bundle.addfile(member, _Bytes(blob))
            count += 1
    console.print(f"wrote {count:,} blocks to {args.file}")
    return 1 if skipped else 0


def _import(tier: Tier, args: argparse.Namespace, console: Console) -> int:
    """take the blocks of a tar file, each of which is proven first"""
    count = refused = 0
    for name, blob in _members(args.file):
        try:
            if BlockLayout.read(blob)[1].hex != name:
                raise CorruptBlockError("it is the block of another key")
            tier.write(name, memoryview(blob))
            count += 1
        except CorruptBlockError as error:
            console.print(f"{name:.80}: refused: {error}")
            refused += 1
    console.print(f"took {count:,} blocks from {args.file}")
    return 1 if refused else 0


def _members(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with tarfile.open(file) as bundle:
            for member in bundle:
                if member.isreg() and member.size <= MOST_BLOCK and (stream := bundle.extractfile(member)):
                    yield member.name, np.frombuffer(stream.read(), np.uint8)
    except (OSError, tarfile.TarError) as error:
        raise TierError("io", f"{file}: {error}") from error


def _problem(tier: Tier, stored: Stored) -> str | None:
    try:
        name = BlockLayout.read(_read(tier, stored))[1]
    except (TierError, CorruptBlockError) as error:
        return str(error)
    return None if name.hex == stored.key else f"it is the block {name.hex}"


def _read(tier: Tier, stored: Stored) -> np.ndarray:
    """The bytes of a block.

    Raises:
        TierError: it cannot be read.
        CorruptBlockError: it is gone, or too large to be one.
    """
    if stored.nbytes > MOST_BLOCK:
        raise CorruptBlockError(f"{stored.nbytes} bytes")
    if not stored.nbytes:
        blob = tier.load(stored.key)
        if blob is None:
            raise CorruptBlockError("it is gone")
        return np.frombuffer(blob, np.uint8)
    buffer = np.zeros(stored.nbytes, np.uint8)
    if not tier.read(stored.key, memoryview(buffer)):
        raise CorruptBlockError("it is gone")
    return buffer


class _Bytes:
    """A file of an array's bytes, without a copy."""

    def __init__(self, blob: np.ndarray) -> None:
        self._rest = memoryview(blob)

    def read(self, count: int = -1) -> bytes:
        count = len(self._rest) if count < 0 else count
        head, self._rest = self._rest[:count], self._rest[count:]
        return bytes(head)


def _ago(used: float) -> str:
    if not used:
        return "-"
    seconds = max(time.time() - used, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _size(text: str) -> int:
    try:
        return memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _age(text: str) -> float:
    """Seconds of '7d', '12h', '30m' or '45s'."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    try:
        return float(text[:-1]) * units[text[-1]]
    except (KeyError, ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r} is not an age like 7d, 12h, 30m or 45s") from None


if __name__ == "__main__":
    sys.exit(main())
