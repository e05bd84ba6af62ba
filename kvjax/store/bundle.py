"""Bundles: tar files of blocks, each member named by its key, read without trust in anything but the blocks' own proof.

    512 bytes   header of a member: name, size, type, checksum of the header
    member      a block, padded to 512 bytes
    1024 zeros  the end

`tarfile` ends without a word at a header that it cannot read, and reads as much as a header says. Here each member is
refused by itself, with a reason, and the next header is looked for behind it, wherever that is.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.store.block import MOST_HEADER, Blob, BlockLayout, CorruptBlockError
from kvjax.store.keys import BlockKey
from kvjax.store.proof import check_claim

UNIT = 512
MOST_LOST = 4 << 30  # bytes without a member, after which the rest of a bundle is not looked at
MOST_EXTENDED = 1 << 20  # bytes of an extended header, of which nothing is used
EXTENDED = b"xgLK"
FILES = b"0\x007"
KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}
OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


@dataclasses.dataclass(frozen=True, eq=False)
class BundledBlock:
    """One member: a proven block, or why it is none.

    Attributes:
        name: of the member; "" for a problem of the bundle itself.
        key, blob: of a block; None where there is a `problem`.
    """

    name: str
    problem: str = ""
    key: BlockKey | None = None
    blob: Blob | None = None


class BundleWriter:
    """A bundle that is whole or not there: written beside its place, then renamed. A context manager.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._part = self._path.with_name(f"{self._path.name}.part")

    def __enter__(self) -> "BundleWriter":
        if self._path.exists() and not self._path.is_file():
            raise FileExistsError(0, "it is there and not a file")
        self._tar = tarfile.open(self._part, "w", format=tarfile.USTAR_FORMAT)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        try:
            self._tar.close()
            if kind is None:
                os.replace(self._part, self._path)
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, key: str, blob: Blob, used: float) -> None:
        """Writes a block that was used at a time."""
        member = tarfile.TarInfo(key)
        member.size, member.mode, member.mtime = blob.nbytes, 0o600, int(min(max(used, 0.0), 8.0**11 - 1))
        self._tar.addfile(member, io.BytesIO(memoryview(blob)))


def read_bundle(path: Path) -> Iterator[BundledBlock]:
    """Every member of a bundle, which may be compressed by gzip, bzip2 or xz, in its order.

    Raises:
        OSError: it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        opener = OPENERS.get(file.peek(2)[:2])
        yield from _members(_Stream(stack.enter_context(opener(file)) if opener else file))


def _members(stream: "_Stream") -> Iterator[BundledBlock]:
    zeros = lost = 0  # units of zeros in a row; bytes since the last member that was one
    while len(header := stream.peek(UNIT)) == UNIT:
        at, quiet = stream.position, lost > 0
        stream.skip(UNIT)
        if not any(header):
            zeros, lost = zeros + 1, lost + UNIT if lost else 0
        else:
            if zeros > 1 and not lost:
                yield BundledBlock("", f"at byte {at} there is more behind its end, which is looked at too")
            zeros = 0
            try:
                name, size, kind = _parse(header)
            except ValueError:
                lost += UNIT
                if not quiet:
                    yield BundledBlock("", f"at byte {at} there is no member: the next one is looked for")
            else:
                block = _member(stream, name, size, kind)
                if block is not None:
                    yield block
                # what is not taken may lie of its size, so what follows is not known to be a header
                lost = UNIT if (block is None or block.problem) and kind not in KINDS else 0
        if max(lost, zeros * UNIT) > MOST_LOST:
            yield BundledBlock("", f"no member for {MOST_LOST} bytes: the rest is not looked at")
            return
    if stream.error or zeros < 2:
        yield BundledBlock("", f"it was cut: its end is missing{stream.error and f' ({stream.error})'}")


def _member(stream: "_Stream", name: str, size: int, kind: bytes) -> BundledBlock | None:
    """The member that begins here, taken from the stream if it is a block; None for one of no meaning."""
    if kind in EXTENDED and size <= MOST_EXTENDED:
        return None
    if kind not in FILES:
        return BundledBlock(name, f"it is {KINDS.get(kind, f'of type {kind!a}')}, not a file")
    try:
        layout, key = BlockLayout.read_header(np.frombuffer(stream.peek(min(size, 8 + MOST_HEADER)), np.uint8))
        check_claim(layout, size)
        if key.hex != name:
            raise CorruptBlockError(f"it is the block of another key, {key.hex}")
        blob = np.frombuffer(stream.peek(size), np.uint8)
        if blob.nbytes < size:
            raise CorruptBlockError(f"it was cut after {blob.nbytes} of {size} bytes")
        layout.check(blob, key)
    except CorruptBlockError as error:
        return BundledBlock(name, str(error))
    stream.skip(-(-size // UNIT) * UNIT)
    return BundledBlock(name, key=key, blob=blob)


def _parse(header: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a member. Raises ValueError if this is no header."""
    checksum = _number(header[148:156])
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ValueError("its checksum differs")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace"), _number(header[124:136]), header[156:157]


def _number(field: bytes) -> int:
    """In octal digits, or in bytes where the first one says so. Raises ValueError."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError("not a number")
    return int(digits or b"0", 8)


class _Stream:
    """Bytes of a file that may be looked at before they are taken. What cannot be read on ends it.

    Attributes:
        position: bytes taken.
        error: why it ended before the file did; "" if it did not.
    """

    PIECE = 1 << 20

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._ahead = bytearray()
        self._at = 0  # where what is ahead begins
        self.position, self.error = 0, ""

    def peek(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        while len(self._ahead) - self._at < count and not self.error:
            try:
                piece = self._file.read1(self.PIECE)  # what comes before an error is not lost with it
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                self.error = str(error) or type(error).__name__
                break
            if not piece:
                break
            self._ahead += piece
        return bytes(self._ahead[self._at : self._at + count])

    def skip(self, count: int) -> None:
        """Takes the next bytes, as far as there are any."""
        while count and (taken := min(count, len(self.peek(min(count, self.PIECE))))):
            self._at, self.position, count = self._at + taken, self.position + taken, count - taken
            if self._at >= 4 * self.PIECE:
                del self._ahead[: self._at]
                self._at = 0
