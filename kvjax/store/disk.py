"""The disk tier: one file a block in a folder that several servers may share, never larger than it may be.

Writes go from the caller's memory and reads into it, without a copy between. The files are the truth: what another
server adds or removes is seen because its folder's time changes, and a start needs nothing but a listing.

    ROOT/kvjax-kv-2/lock                       held while space is made and taken, never while data moves
    ROOT/kvjax-kv-2/ab/abcdef...               a block; its time says when it was last used
    ROOT/kvjax-kv-2/ab/abcdef.PID.N.__lock     a block that is being written: its space is taken, its writer locks it
    ROOT/kvjax-kv-2/pins/abcdef...             an empty file: that block does not leave

    write: lock { list what changed, make room, take it } ── data, no lock ── lock { rename }
"""

import collections
import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvjax.store.block import PAGE
from kvjax.store.claims import Claims
from kvjax.store.disk_index import DiskIndex
from kvjax.store.disk_listing import DiskListing, blocks_in, is_folder, make_folders, space, space_below
from kvjax.store.disk_lock import FolderLock
from kvjax.store.disk_parents import ATTRIBUTE, HEAD, ParentReader, parent_in
from kvjax.store.disk_pins import DiskPins
from kvjax.store.disk_space import DiskSpace
from kvjax.store.eviction import LRU, EvictionPolicy
from kvjax.store.keys import FORMAT
from kvjax.store.names import object_name
from kvjax.store.tier import Stored, Tier, TierError
from kvjax.store.whole_file import PartialFile, read_whole

logger = logging.getLogger(__name__)
START_SECONDS, SECONDS = 5.0, 1.0  # that a start, and any other call, waits for a lock
PATIENCE = 0.1  # seconds that a question for what is held waits
SHARDS = tuple(f"{number:02x}" for number in range(256))
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
STEP = 1000  # nanoseconds between the times of two blocks of a chain


class DiskTier(Tier):
    """Blocks in a folder.

    Args:
        root: made if it is not there, also when it is removed later; only its owner may read what is put there.
        most_bytes: of everything under `root`: blocks, temporary files, and what was there before.
        policy: who leaves first; a start takes the order of last use from the files' times.
        sync: whether a block is on the medium, not only with the operating system, before it counts as written.
        least_free: bytes of the file system that stay free.

    Raises:
        TierError: the folder cannot be made or read, or another process keeps its lock ("timeout").
    """

    name, evicts = "disk", True

    def __init__(
        self,
        root: Path,
        most_bytes: int,
        *,
        policy: EvictionPolicy | None = None,
        sync: bool = False,
        least_free: int = 1 << 30,
    ) -> None:
        self.most_bytes, self._sync = most_bytes, sync
        self._root, self._base = root, root / FORMAT
        self._mutex = threading.RLock()  # of the index, for moments; never taken before the folder's lock
        self._closed = False
        self._uses: collections.deque[str] = collections.deque()  # of which the policy has not been told yet
        self._claims = Claims()
        self._held = {"blocks": 0, "used_bytes": 0, "evictions": 0}
        self._index = DiskIndex(policy or LRU())
        self._pins = DiskPins(self._base, self._index)
        self._space = DiskSpace(self._base, self._index, most_bytes, least_free, self._stays)
        self._parents = ParentReader(lambda key: self._base / object_name(key), self._link)
        self._listing = DiskListing(self._base, self._index, self._parents.ask)
        self._lock = FolderLock(self._base / "lock", self._make_folders)
        try:
            with _errors(self._base):
                self._start()
        except TierError:
            self.close()
            raise

    @property
    def used_bytes(self) -> int:
        """Bytes under `root`, as far as this process has looked."""
        return self._space.used_bytes

    @property
    def evictions(self) -> int:
        return self._space.evictions

    def __len__(self) -> int:
        """Blocks, as far as this process has looked."""
        return self._index.blocks

    def read(self, key: str, into: memoryview) -> bool:
        path = self._path(key)
        with _errors(path):
            if not read_whole(path, into):
                return False
        self._use([key])
        return True

    def contains(self, key: str) -> bool:
        path = self._path(key)
        with _errors(path):
            return path.is_file()

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """As `contains`: where many of a folder's blocks are asked for, by a listing of it."""
        paths = [self._path(key) for key in keys]
        shards = collections.Counter(key[:2] for key in keys)
        listed: set[str] = set()
        with _errors(self._base):
            # a file's status costs about as much as four names of a listing
            many = {shard for shard, count in shards.items() if 4 * count > max(len(self._index.names(shard)), 16)}
            for shard in many:
                listed.update(entry.name for entry in blocks_in(self._base / shard))
            return [key in listed if key[:2] in many else path.is_file() for key, path in zip(keys, paths, strict=True)]

    def touch(self, keys: Sequence[str]) -> list[bool]:
        """As in `Tier`; also the files get their times, with which the next process knows the order."""
        there = self.contains_many(keys)
        present = [key for key, here in zip(keys, there, strict=True) if here]
        latest = time.time_ns()
        for index, key in enumerate(present):
            with contextlib.suppress(OSError):  # of a file that is deleted meanwhile, or another user's
                used = latest - STEP * index
                os.utime(self._path(key), ns=(used, used))
        self._use(reversed(present))
        return there

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        path = self._path(key)
        if parent:
            object_name(parent)
        with _errors(path):
            if self.used_bytes + blob.nbytes > self.most_bytes:
                self._parents.wait(SECONDS)  # what is evicted depends on them
            with self._claims.hold(key, SECONDS):
                try:
                    self._write(path, blob, parent)
                except _NoSpaceError:
                    with self._alone():
                        self._refresh()
                        helped = self._space.give_up(blob.nbytes)
                    if not helped:
                        raise
                    self._write(path, blob, parent)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _errors(path), self._alone():
            if not is_folder(path):
                path.unlink(missing_ok=True)
                self._index.drop(key[:2], key)

    def pin(self, keys: Sequence[str]) -> list[bool]:
        """As in `Tier`; pins last until `unpin`, also for other processes and after a restart."""
        paths = [self._path(key) for key in keys]
        with _errors(self._base), self._alone():
            there = [path.is_file() for path in paths]
            self._pins.add([key for key, here in zip(keys, there, strict=True) if here])
            self._refresh()
        return there

    def unpin(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._path(key)
        with _errors(self._base), self._alone():
            self._pins.remove(keys)
            self._refresh()

    def scan(self) -> Iterator[Stored]:
        self._check_open()
        with _errors(self._base):
            for shard in SHARDS:
                for entry in blocks_in(self._base / shard):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        yield Stored(entry.name, status.st_size, status.st_mtime)

    def held(self) -> dict[str, Any]:
        """What it holds, or held before a listing that takes long."""
        if self._mutex.acquire(timeout=PATIENCE):
            try:
                self._held = {"blocks": len(self), "used_bytes": self.used_bytes, "evictions": self.evictions}
            finally:
                self._mutex.release()
        return self._held | {"capacity_bytes": self.most_bytes}

    def close(self) -> None:
        if not self._closed:
            self._parents.close(SECONDS)
            self._closed = True
            self._lock.close(SECONDS)

    def check_integrity(self) -> None:
        """Raises AssertionError if it holds more than it may or other than it says. Only while nobody writes."""
        with self._alone():
            self._listing.forget()
            self._refresh()
            assert not len(self._claims)
            assert len(self) == len(self._index.policy)
            assert sorted(self._index.policy.order()) == sorted(stored.key for stored in self.scan())
            assert not self._index.temporaries(), "temporary files are left"
            assert self.used_bytes <= self.most_bytes, f"{self.used_bytes} bytes of {self.most_bytes}"

    def _start(self) -> None:
        with self._alone(START_SECONDS):
            self._refresh()
            self._space.sweep()
            self._pins.forget_absent()
        if self.used_bytes > self.most_bytes:  # it may have been larger before
            self._parents.wait(START_SECONDS)
            with self._alone(START_SECONDS):
                self._refresh()
                self._space.shrink()
        self._space.warn_if_unusable()

    def _write(self, path: Path, blob: memoryview, parent: str) -> None:
        key, shard = path.name, path.parent.name
        with contextlib.ExitStack() as stack:
            with self._alone():
                self._refresh()
                if self._index.knows(key):
                    return
                self._index.begin(key, parent)
                stack.callback(self._cancel, key)
                self._space.make_room(key, blob.nbytes, parent)
                with _no_space():
                    path.parent.mkdir(exist_ok=True, mode=0o700)  # somebody may have removed it
                    file = stack.enter_context(PartialFile(path, blob.nbytes))
                stack.callback(self._drop, shard, file.temporary.name)
                self._index.put(shard, file.temporary.name, _pages(blob.nbytes))
            if parent and len(parent) % 2 == 0 and parent != parent_in(bytes(blob[:HEAD]), key):
                file.set_attribute(ATTRIBUTE, bytes.fromhex(parent))
            with _no_space():
                file.fill(blob, sync=self._sync)
            with self._alone():
                file.commit()
                self._index.drop(shard, file.temporary.name)
                self._index.put(shard, key, space(os.stat(path)))
            if self._sync:
                file.sync_name()

    def _stays(self, key: str) -> bool:
        return key in self._claims or key in self._pins

    def _cancel(self, key: str) -> None:
        with self._mutex:
            self._index.cancel(key)

    def _drop(self, shard: str, name: str) -> None:
        with self._mutex:
            self._index.drop(shard, name)

    def _link(self, parents: dict[str, str]) -> None:
        with self._mutex:
            for key, parent in parents.items():
                self._index.link(key, parent)

    def _use(self, keys: Sequence[str] | Iterator[str]) -> None:
        """Counts uses, now or, while another thread works with the index, later: nobody who reads waits for it."""
        self._uses.extend(keys)
        if self._mutex.acquire(blocking=False):
            try:
                self._count_uses()
            finally:
                self._mutex.release()

    def _count_uses(self) -> None:
        while self._uses:
            self._index.policy.use(self._uses.popleft())

    def _refresh(self) -> None:
        self._listing.refresh(self._lock.now())
        self._count_uses()

    @contextlib.contextmanager
    def _alone(self, seconds: float = SECONDS) -> Iterator[None]:
        """Keeps other threads and other processes from making or taking space."""
        with self._lock.hold(seconds), self._mutex:
            yield

    def _make_folders(self) -> None:
        if self._index.blocks:
            logger.warning("%s: its lock is gone, and perhaps the folder with it: it is made anew", self._base)
        make_folders(self._base, SHARDS)
        self._space.foreign = space_below(self._root, without=self._base.name)

    def _path(self, key: str) -> Path:
        self._check_open()
        return self._base / object_name(key)

    def _check_open(self) -> None:
        if self._closed:
            raise TierError("refused", "the disk tier is closed")


class _NoSpaceError(OSError):
    """The file system has no place for a file, whatever it said before."""


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise _NoSpaceError(error.errno, error.strerror) from error
        raise


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (*NO_SPACE, errno.EFBIG)
        raise TierError("full" if full else "io", f"{path}: {error}") from error
