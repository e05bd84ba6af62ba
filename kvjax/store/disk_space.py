"""The space of a disk tier: what is in its way leaves, so that never more bytes are taken than allowed."""

import collections
import logging
import os
from collections.abc import Callable
from pathlib import Path

from kvjax.store.block import PAGE
from kvjax.store.disk_index import DiskIndex
from kvjax.store.disk_listing import space
from kvjax.store.names import object_name
from kvjax.store.sizes import show_size
from kvjax.store.tier import TierError
from kvjax.store.whole_file import remove_if_dead

logger = logging.getLogger(__name__)
REFUSALS = 1 << 14  # keys that are remembered as refused


class DiskSpace:
    """Makes room under `base`. Whoever calls it holds the folder's lock, and has brought the index up to date.

    Args:
        most_bytes: of everything under the tier's root.
        least_free: bytes of the file system that stay free.
        stays: whether a block must not leave, and so must its ancestors.

    Attributes:
        foreign: bytes under the tier's root that are not in the index.
        evictions: blocks that have left for others.
    """

    def __init__(
        self, base: Path, index: DiskIndex, most_bytes: int, least_free: int, stays: Callable[[str], bool]
    ) -> None:
        self._base, self._index = base, index
        self._most_bytes, self._least_free, self._stays = most_bytes, least_free, stays
        self._refused: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.foreign = self.evictions = 0

    @property
    def used_bytes(self) -> int:
        return self.foreign + self._index.used_bytes

    def make_room(self, key: str, nbytes: int, parent: str) -> None:
        """Removes blocks until a file of so many bytes fits; where it never will, only what is too much without it.

        No block leaves for one that goes on from a block that was refused: their chain is longer than the disk, and
        what would leave may be of its beginning.

        Raises:
            TierError: it does not fit ("full").
            OSError: a file cannot be removed, or nobody can say how much is free.
        """
        over, inodes = self._missing(nbytes)
        if over > 0 or inodes > 0:
            self.sweep()
            over, inodes = self._missing(nbytes)
        if over <= 0 and inodes <= 0:
            self._refused.pop(key, None)
            return
        dead_end = parent in self._refused and parent not in self._index.policy
        victims = [] if dead_end or over > self._index.block_bytes else self._victims(over, inodes)
        if sum(map(self._index.nbytes, victims)) < over or len(victims) < inodes:
            self.shrink()
            self._refuse(key)
            raise TierError(
                "full",
                f"{self._base}: no room for {nbytes} bytes in {self._most_bytes}, or in what the file system has free: "
                "the blocks that may leave for it, which are no pinned ones and none of its own chain, are too few",
            )
        self._refused.pop(key, None)
        for victim in victims:
            self._evict(victim)

    def shrink(self) -> None:
        """Removes temporary files of dead writers, and blocks while there are more bytes than there may be."""
        if self.used_bytes > self._most_bytes:
            self.sweep()
        for key in self._victims(self.used_bytes - self._most_bytes, 0):
            self._evict(key)

    def give_up(self, nbytes: int) -> bool:
        """Removes blocks of so many bytes, at least one, though nothing says that they are in the way.

        For a file system that refuses a file that should fit: of an inode, a quota, or space that it counts otherwise.
        """
        victims = self._victims(nbytes, 1)
        for key in victims:
            self._evict(key)
        return bool(victims)

    def warn_if_unusable(self) -> None:
        """Says how much of the limit can be used, if some of the file system shall stay free and that is not all."""
        free = max(_free_bytes(os.statvfs(self._base)) - self._promised_bytes() - self._least_free, 0)
        usable = max(min(self._most_bytes - self.foreign, self._index.used_bytes + free), 0)
        if self._least_free and usable < self._most_bytes:
            logger.warning(
                "%s: of the limit of %s only %s can be used, by what else lies there and by what its file system has "
                "free: make room, or lower the limit",
                self._base, show_size(self._most_bytes), show_size(usable),
            )  # fmt: skip

    def sweep(self) -> None:
        """Removes the temporary files of writers that are no more."""
        for shard, name in self._index.temporaries():
            if remove_if_dead(self._base / shard / name):
                self._index.drop(shard, name)

    def _missing(self, nbytes: int) -> tuple[int, int]:
        """Bytes and inodes that a new file lacks."""
        needed = -(-nbytes // PAGE) * PAGE
        system = os.statvfs(self._base)
        free = _free_bytes(system) - self._promised_bytes()
        over = needed + max(self.used_bytes - self._most_bytes, self._least_free - free)
        return over, int(bool(system.f_files) and system.f_favail < 1)  # some file systems count no inodes

    def _promised_bytes(self) -> int:
        """Bytes of files that are being written, for which the file system has set nothing aside."""
        promised = 0
        for shard, name in self._index.temporaries():
            try:
                status = os.lstat(self._base / shard / name)
            except FileNotFoundError:
                continue
            promised += max(space(status) - status.st_blocks * 512, 0)
        return promised

    def _victims(self, nbytes: int, count: int) -> list[str]:
        """The first to leave, until they are so many and have so many bytes; all that may, if that is not enough."""
        victims: list[str] = []
        if nbytes > 0 or count > 0:
            for key in self._index.policy.order(self._stays):
                victims.append(key)
                nbytes, count = nbytes - self._index.nbytes(key), count - 1
                if nbytes <= 0 and count <= 0:
                    break
        return victims

    def _refuse(self, key: str) -> None:
        self._refused[key] = None
        if len(self._refused) > REFUSALS:
            self._refused.popitem(last=False)

    def _evict(self, key: str) -> None:
        (self._base / object_name(key)).unlink(missing_ok=True)
        self._index.drop(key[:2], key)
        self.evictions += 1


def _free_bytes(system: os.statvfs_result) -> int:
    return system.f_bavail * system.f_frsize
