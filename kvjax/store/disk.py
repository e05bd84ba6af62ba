"""The disk tier: one file a block in a folder that several servers may share, never larger than it may be.

Writes go from the caller's memory and reads into it, without a copy between. The files are the truth: what another
server adds or removes is seen because its folder's time changes, and a start needs nothing but a listing.

    ROOT/kvjax-kv-2/lock            held while space is made and taken, against other processes
    ROOT/kvjax-kv-2/ab/abcdef...    a block; its time says when it was last read
"""

import collections
import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvjax.store.block import PAGE
from kvjax.store.eviction import LRU, EvictionPolicy
from kvjax.store.keys import FORMAT
from kvjax.store.names import key_of, object_name
from kvjax.store.tier import Stored, Tier, TierError
from kvjax.store.whole_file import TEMPORARY, write_whole

# A folder that changed just before it was listed may have changed again within one tick of the file system's clock.
RACY = 0.1
PATIENCE = 0.1  # seconds that a question for what is held may wait for a write


class DiskTier(Tier):
    """Blocks in a folder.

    Args:
        root: made if it is not there; only its owner may read what is put there.
        most_bytes: of everything under `root`: blocks, temporary files, and what was there before.
        policy: who leaves first; a start takes the order of last use from the files' times.
        sync: whether a block is on the medium, not only with the operating system, before it counts as written.
        least_free: bytes of the file system that stay free.

    Raises:
        TierError: the folder cannot be made or read.
    """

    name = "disk"

    def __init__(
        self,
        root: Path,
        most_bytes: int,
        *,
        policy: EvictionPolicy | None = None,
        sync: bool = False,
        least_free: int = 1 << 30,
    ) -> None:
        self.most_bytes, self.evictions = most_bytes, 0
        self._least_free, self._policy, self._sync = least_free, policy or LRU(), sync
        self._base = root / FORMAT
        self._mutex = threading.RLock()
        self._closed = False
        self._reads: collections.deque[str] = collections.deque()  # of which the policy has not been told yet
        self._listed: dict[str, int] = {}  # the time, in ns, of each folder when it was listed; 0 to list it again
        self._files: dict[str, dict[str, int]] = {}  # bytes of each file of each folder
        self._held = {"blocks": 0, "used_bytes": 0, "evictions": 0}
        with _errors(self._base):
            self._base.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._base.chmod(0o700)
            for number in range(256):
                (self._base / f"{number:02x}").mkdir(exist_ok=True, mode=0o700)
            self._lock = os.open(self._base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._foreign = self._space_of_others(root)
            with self._alone():
                self._refresh()
                self._sweep()
                self._evict(self.used_bytes - most_bytes)  # it may have been larger before

    @property
    def used_bytes(self) -> int:
        """Bytes under `root`, as far as this process has looked."""
        with self._mutex:
            return self._foreign + sum(sum(files.values()) for files in self._files.values())

    def __len__(self) -> int:
        """Blocks, as far as this process has looked."""
        with self._mutex:
            return sum(1 for _ in self._policy.order())

    def read(self, key: str, into: memoryview) -> bool:
        path = self._path(key)
        with _errors(path):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            try:
                size = os.fstat(file).st_size
                if size != into.nbytes:
                    raise TierError("length", f"{path} has {size} bytes instead of {into.nbytes}")
                done = 0
                while done < size:
                    got = os.preadv(file, [into[done:]], done)
                    if got == 0:
                        raise TierError("length", f"{path} ended after {done} bytes")
                    done += got
                with contextlib.suppress(OSError):  # of a file that is deleted meanwhile, or another user's
                    os.utime(file)
            finally:
                os.close(file)
        self._reads.append(key)
        if self._mutex.acquire(blocking=False):  # while another thread writes, nobody who reads waits for it
            try:
                self._count_reads()
            finally:
                self._mutex.release()
        return True

    def contains(self, key: str) -> bool:
        path = self._path(key)
        with _errors(path):
            return path.is_file()

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        path = self._path(key)
        with _errors(path), self._alone():
            self._refresh()
            if self._knows(key):
                return
            self._make_room(blob.nbytes)
            shard = key[:2]
            self._listed[shard] = 0  # whatever becomes of it
            try:
                write_whole(path, blob, sync=self._sync)
            finally:
                self._refresh(shard)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _errors(path), self._alone():
            path.unlink(missing_ok=True)
            self._listed[key[:2]] = 0
            self._refresh()

    def scan(self) -> Iterator[Stored]:
        if self._closed:
            raise TierError("refused", "the disk tier is closed")
        with _errors(self._base):
            for shard in sorted(self._listed):
                with os.scandir(self._base / shard) as entries:
                    for entry in entries:
                        if key_of(f"{shard}/{entry.name}"):
                            with contextlib.suppress(FileNotFoundError):
                                stat = entry.stat()
                                yield Stored(entry.name, stat.st_size, stat.st_mtime)

    def held(self) -> dict[str, Any]:
        """What it holds, or held before a write that takes long."""
        if self._mutex.acquire(timeout=PATIENCE):
            try:
                self._held = {"blocks": len(self), "used_bytes": self.used_bytes, "evictions": self.evictions}
            finally:
                self._mutex.release()
        return self._held | {"capacity_bytes": self.most_bytes}

    def close(self) -> None:
        with self._mutex:
            if not self._closed:
                self._closed = True
                os.close(self._lock)

    def check_integrity(self) -> None:
        """Raises AssertionError if it holds more than it may or other than it says. Only while nobody writes."""
        with self._mutex:
            self._listed = dict.fromkeys(self._listed, 0)
            self._refresh()
            assert sorted(self._policy.order()) == sorted(stored.key for stored in self.scan())
            assert not list(self._base.glob(f"*/*{TEMPORARY}")), "temporary files are left"
            assert self.used_bytes <= self.most_bytes, f"{self.used_bytes} bytes of {self.most_bytes}"

    def _path(self, key: str) -> Path:
        if self._closed:
            raise TierError("refused", "the disk tier is closed")
        return self._base / object_name(key)

    def _count_reads(self) -> None:
        while self._reads:
            key = self._reads.popleft()
            if self._knows(key):
                self._policy.use(key)

    def _knows(self, key: str) -> bool:
        return key in self._files.get(key[:2], ())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other threads and other processes from making or taking space."""
        with self._mutex:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _make_room(self, nbytes: int) -> None:
        """Removes blocks until a file of so many bytes fits; where it never will, only what is too much without it.

        Raises:
            TierError: it does not fit.
        """
        needed = -(-nbytes // PAGE) * PAGE
        stat = os.statvfs(self._base)
        over = needed + max(self.used_bytes - self.most_bytes, self._least_free - stat.f_bavail * stat.f_frsize)
        if over > 0:
            over -= self._sweep()
        if over <= 0:
            return
        if over <= sum(self._files[key[:2]][key] for key in self._policy.order()):
            self._evict(over)
            return
        self._evict(self.used_bytes - self.most_bytes)
        raise TierError("full", f"{self._base}: no room for {nbytes} bytes in {self.most_bytes}")

    def _evict(self, nbytes: int) -> None:
        """Removes blocks until so many bytes are free, or none is left."""
        self._count_reads()
        for key in list(self._policy.order()) if nbytes > 0 else ():
            if nbytes <= 0:
                break
            nbytes -= self._files[key[:2]][key]
            self._path(key).unlink(missing_ok=True)
            self._forget(key)
            self.evictions += 1

    def _forget(self, key: str) -> None:
        del self._files[key[:2]][key]
        self._policy.remove(key)

    def _refresh(self, shard: str | None = None) -> None:
        """Lists each folder, or this one, that has changed since it was. What an error cuts short is listed again."""
        fresh: list[tuple[float, str]] = []
        now = self._now()
        try:
            for name, changed in self._changes(shard):
                if self._listed.get(name) != changed:
                    fresh += self._list(name)
                    self._listed[name] = 0 if now - changed / 1e9 < RACY else changed
        finally:
            for _, name in sorted(fresh):
                self._policy.add(name)

    def _changes(self, shard: str | None) -> Iterator[tuple[str, int]]:
        """When each folder of blocks, or this one, changed last: in ns."""
        if shard is not None:
            yield shard, (self._base / shard).stat().st_mtime_ns
            return
        with os.scandir(self._base) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.stat(follow_symlinks=False).st_mtime_ns

    def _list(self, shard: str) -> list[tuple[float, str]]:
        """Looks at every file of a folder; returns the blocks that are new, with their times."""
        known, there = self._files.setdefault(shard, {}), {}
        fresh: list[tuple[float, str]] = []
        with os.scandir(self._base / shard) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    there[entry.name] = _space(stat)
                    if entry.name not in known and key_of(f"{shard}/{entry.name}"):
                        fresh.append((stat.st_mtime, entry.name))
        for name in known.keys() - there.keys():
            self._policy.remove(name)
        self._files[shard] = there
        return fresh

    def _now(self) -> float:
        """By the clock that gives files their times, which may be another machine's and is not ours to trust."""
        os.utime(self._lock)
        return os.fstat(self._lock).st_mtime

    def _sweep(self) -> int:
        """Removes the temporary files that were listed; returns their bytes.

        Whoever writes holds the lock, so they are of writers that are no more.
        """
        freed = 0
        for shard, files in self._files.items():
            for name in [name for name in files if name.endswith(TEMPORARY)]:
                (self._base / shard / name).unlink(missing_ok=True)
                freed += files.pop(name)
        return freed

    def _space_of_others(self, root: Path) -> int:
        """What everything under `root` takes that is not ours."""
        taken = 0
        for folder, folders, files in os.walk(root):
            if folder == str(root) and self._base.name in folders:
                folders.remove(self._base.name)
            taken += sum(_space(os.lstat(os.path.join(folder, name))) for name in (*folders, *files))
        return taken


def _space(stat: os.stat_result) -> int:
    """What a file takes: some file systems say so only later, so never less than the pages of its length."""
    return max(stat.st_blocks * 512, -(-stat.st_size // PAGE) * PAGE)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise TierError("full" if full else "io", f"{path}: {error}") from error
