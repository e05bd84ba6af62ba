"""The listing of a disk tier's folder: what others add or remove is seen because a folder's time changes."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvjax.store.block import PAGE
from kvjax.store.disk_index import DiskIndex
from kvjax.store.names import key_of
from kvjax.store.whole_file import TEMPORARY

# A folder that changed just before it was listed may have changed again within one tick of the file system's clock.
RACY = 0.1
Fresh = tuple[float, str, str, int, bool]  # time, folder, name, bytes, whether it is a regular file


class DiskListing:
    """Brings an index up to date with the folders under `base`.

    Args:
        arrived: gets the keys of the blocks that were not known before, the oldest first.
    """

    def __init__(self, base: Path, index: DiskIndex, arrived: Callable[[list[str]], None]) -> None:
        self._base, self._index, self._arrived = base, index, arrived
        self._listed: dict[str, int] = {}  # the time, in ns, of each folder when it was listed; 0 to list it again

    def forget(self) -> None:
        """Has every folder listed again."""
        self._listed = dict.fromkeys(self._listed, 0)

    def refresh(self, now: float) -> None:
        """Lists each folder that has changed since it was. What an error cuts short is listed again.

        Args:
            now: by the clock that gives files their times.

        Raises:
            OSError: a folder cannot be listed.
        """
        fresh: list[Fresh] = []
        gone = set(self._listed)
        try:
            with os.scandir(self._base) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            changed = entry.stat(follow_symlinks=False).st_mtime_ns
                            if self._listed.get(entry.name) != changed:
                                fresh += self._list(entry.name)
                                self._listed[entry.name] = 0 if now - changed / 1e9 < RACY else changed
                            gone.discard(entry.name)
            for shard in gone:
                del self._listed[shard]
                self._drop(shard, set(self._index.names(shard)))
        finally:
            self._add(sorted(fresh))

    def _list(self, shard: str) -> list[Fresh]:
        """Looks at the names of a folder; returns the files that are new, and those whose size may have changed."""
        known, there, fresh = self._index.names(shard), set(), []
        with os.scandir(self._base / shard) as entries:
            for entry in entries:
                folder = entry.is_dir(follow_symlinks=False)
                if folder or entry.name not in known or entry.name.endswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        nbytes = space(status) + (space_below(Path(entry.path)) if folder else 0)
                        fresh.append((status.st_mtime, shard, entry.name, nbytes, not folder))
                there.add(entry.name)
        self._drop(shard, known - there)
        return fresh

    def _add(self, fresh: list[Fresh]) -> None:
        put = self._index.put
        arrived = [name for _, shard, name, nbytes, regular in fresh if put(shard, name, nbytes, regular=regular)]
        if arrived:
            self._arrived(arrived)

    def _drop(self, shard: str, names: set[str]) -> None:
        for name in names:
            self._index.drop(shard, name)


def make_folders(base: Path, shards: Iterable[str]) -> None:
    """Makes the folders that are missing, which only their owner may look into. Raises OSError."""
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    base.chmod(0o700)
    for shard in shards:
        (base / shard).mkdir(exist_ok=True, mode=0o700)


def blocks_in(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The blocks of a folder, none where it is gone. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if key_of(f"{folder.name}/{entry.name}") and entry.is_file():
                yield entry


def space(status: os.stat_result) -> int:
    """Bytes that a file takes: some file systems say so only later, so never less than the pages of its length."""
    return max(status.st_blocks * 512, -(-status.st_size // PAGE) * PAGE)


def space_below(folder: Path, without: str = "") -> int:
    """Bytes that everything below a folder takes, but for the one called `without` that is directly in it."""
    taken = 0
    for parent, folders, files in os.walk(folder):
        if parent == str(folder) and without in folders:
            folders.remove(without)
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                taken += space(os.lstat(os.path.join(parent, name)))
    return taken


def is_folder(path: Path) -> bool:
    """Whether a folder is there; not for a link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
