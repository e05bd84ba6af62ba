"""A disk cache as its files are, for tools: whatever lies in it is listed, and looking changes nothing.

`DiskTier` serves an engine: it sweeps and evicts when it is opened, and a read counts as use. This looks at the same
files beside a running server, and what is no file there is an object like others, harmed.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from kvjax.store.disk import DiskTier
from kvjax.store.keys import FORMAT
from kvjax.store.names import key_of, object_name
from kvjax.store.tier import Stored, Tier, TierError

SHARD = re.compile(r"[0-9a-f]{2}")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link to nothing",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFileError(TierError):
    """Something else lies where the file of an object should be."""


class Folder(Tier):
    """The files of a disk cache.

    Args:
        root: of the cache, as `DiskTier` takes it.

    Attributes:
        problems: a sentence for each part of it that the last scan could not list.

    Raises:
        ValueError: it is none.
    """

    name = "disk"

    def __init__(self, root: Path) -> None:
        self._root, self._base = root, root / FORMAT
        self._writer: DiskTier | None = None
        self.problems: list[str] = []
        if not self._base.is_dir():
            raise ValueError(f"{root} is not the folder of a disk cache: there is no {FORMAT} in it")

    def read(self, key: str, into: memoryview) -> bool:
        with self._opened(key) as file:
            if file is None:
                return False
            size, done = os.fstat(file).st_size, 0
            if size != into.nbytes:
                raise TierError("length", f"{key} has {size} bytes instead of {into.nbytes}")
            while done < size:
                got = os.preadv(file, [into[done:]], done)
                if not got:
                    raise TierError("length", f"{key} ended after {done} bytes")
                done += got
            return True

    def peek(self, key: str, nbytes: int) -> bytes | None:
        with self._opened(key) as file:
            if file is None:
                return None
            head = b""
            while len(head) < nbytes and (more := os.pread(file, nbytes - len(head), len(head))):
                head += more
            return head

    def contains(self, key: str) -> bool:
        with self._opened(key) as file:
            return file is not None

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        """As an engine does, so that servers which share the folder see it."""
        if self._writer is None:
            self._writer = DiskTier(self._root, 1 << 62, least_free=0)
        self._writer.write(key, blob, parent)

    def delete(self, key: str) -> None:
        path = self._base / object_name(key)
        try:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            hint = "; it is a folder with files in it, remove it by hand" if path.is_dir() else ""
            raise TierError("io", f"{error.strerror}{hint}") from error

    def scan(self) -> Iterator[Stored]:
        self.problems = []
        try:
            shards = sorted(name for name in os.listdir(self._base) if SHARD.fullmatch(name))
        except OSError as error:
            raise TierError("io", f"{self._base} cannot be listed: {error.strerror}") from error
        for shard in shards:
            try:
                with os.scandir(self._base / shard) as entries:
                    names = [entry.name for entry in entries if key_of(f"{shard}/{entry.name}")]
            except FileNotFoundError:
                continue
            except OSError as error:
                self.problems.append(f"{self._base / shard} cannot be listed: {error.strerror}")
                continue
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    yield self._stored(shard, name)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _stored(self, shard: str, name: str) -> Stored:
        path = self._base / shard / name
        try:
            about = path.stat()
        except OSError:  # a link that leads nowhere
            about = path.lstat()
        # a time of 0 would say that it is not known
        return Stored(name, about.st_size if stat.S_ISREG(about.st_mode) else 0, max(about.st_mtime, 1.0))

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int | None]:
        """The file of an object; None if there is none. Anything else is not opened, which might wait or act."""
        path = self._base / object_name(key)
        try:
            try:
                self._check_kind(path.stat().st_mode, key)
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                if path.is_symlink():
                    self._check_kind(stat.S_IFLNK, key)
                yield None
                return
            try:
                self._check_kind(os.fstat(file).st_mode, key)
                yield file
            finally:
                os.close(file)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotAFileError("io", "it is a link to itself, not a file") from error
            raise TierError("io", f"{key}: {error.strerror}") from error

    def _check_kind(self, mode: int, key: str) -> None:
        if not stat.S_ISREG(mode):
            raise NotAFileError("io", f"it is {KINDS.get(stat.S_IFMT(mode), 'something')}, not a file")
