"""The files of a disk tier as they were last listed: bytes, running totals, and the order in which blocks leave."""

from collections.abc import Iterator, KeysView

from kvjax.store.eviction import EvictionPolicy
from kvjax.store.names import key_of
from kvjax.store.whole_file import TEMPORARY


class DiskIndex:
    """What is known of each file, by folder and name. Whoever shares it between threads guards it.

    A block waits without a parent until that is known and here. So the first block of a chain, of which the header
    names the chain's root or a fork, is no dead end; only a block whose parent has left is one.

    Attributes:
        policy: ranks the blocks, and those that are being written.
        used_bytes: of all files.
        block_bytes: of blocks.
        blocks: how many there are.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.used_bytes = self.block_bytes = self.blocks = 0
        self._files: dict[str, dict[str, int]] = {}
        self._blocks: dict[str, int] = {}
        self._temporary: set[tuple[str, str]] = set()
        self._waiting: dict[str, set[str]] = {}  # for each absent parent
        self._absent: dict[str, str] = {}  # the parent that a block waits for

    def knows(self, key: str) -> bool:
        """Whether a block is here whole."""
        return key in self._blocks

    def nbytes(self, key: str) -> int:
        return self._blocks[key]

    def names(self, shard: str) -> KeysView[str]:
        """Of the files of a folder."""
        return self._files.get(shard, {}).keys()

    def temporaries(self) -> list[tuple[str, str]]:
        """Folder and name of each file that is being written, or was when its writer died."""
        return sorted(self._temporary)

    def put(self, shard: str, name: str, nbytes: int, *, regular: bool = True) -> bool:
        """A file is there, of so many bytes; returns whether it is a block.

        Args:
            regular: whether it is a file at all: a folder is never a block, whatever its name.
        """
        files = self._files.setdefault(shard, {})
        if name in files:
            self.drop(shard, name, leaves=not regular)
        files[name] = nbytes
        self.used_bytes += nbytes
        if name.endswith(TEMPORARY) and regular:
            self._temporary.add((shard, name))
            return False
        if not regular or key_of(f"{shard}/{name}") is None:
            return False
        self._blocks[name] = nbytes
        self.block_bytes += nbytes
        self.blocks += 1
        if name in self._waiting:
            self._arrive(name)
        else:
            self.policy.add(name)
        return True

    def drop(self, shard: str, name: str, *, leaves: bool = True) -> None:
        """A file is gone; no effect if it is not known.

        Args:
            leaves: whether a block loses its place in the order.
        """
        nbytes = self._files.get(shard, {}).pop(name, None)
        if nbytes is None:
            return
        self.used_bytes -= nbytes
        self._temporary.discard((shard, name))
        if name in self._blocks and shard == name[:2]:
            del self._blocks[name]
            self.block_bytes -= nbytes
            self.blocks -= 1
            if leaves:
                self._leave(name)

    def begin(self, key: str, parent: str) -> None:
        """A block is being written: its ancestors must not leave for it."""
        self._arrive(key)
        self.link(key, parent)

    def cancel(self, key: str) -> None:
        """A block is no longer being written; no effect if it is here."""
        if key not in self._blocks:
            self._leave(key)

    def link(self, key: str, parent: str) -> None:
        """The parent of a block has become known; it may come from a file's header, which may say anything."""
        if not parent or key not in self.policy:
            return
        if parent not in self.policy:
            self._stop_waiting(key)
            self._waiting.setdefault(parent, set()).add(key)
            self._absent[key] = parent
        elif parent != key and (self.policy.is_leaf(key) or key not in self.policy.ancestors(parent)):
            self.policy.add(key, parent)

    def uses(self, keys: Iterator[str]) -> None:
        """Blocks were used; no effect on those that are not here."""
        for key in keys:
            self.policy.use(key)

    def _arrive(self, key: str) -> None:
        self.policy.add(key)
        for child in self._waiting.pop(key, ()):
            self._absent.pop(child, None)
            self.link(child, key)

    def _leave(self, key: str) -> None:
        self._stop_waiting(key)
        self.policy.remove(key)

    def _stop_waiting(self, key: str) -> None:
        parent = self._absent.pop(key, "")
        waiting = self._waiting.get(parent)
        if waiting is not None:
            waiting.discard(key)
            if not waiting:
                del self._waiting[parent]
