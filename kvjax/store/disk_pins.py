"""The pins of a disk tier: an empty file for each, so that every process and the next start know them."""

from collections.abc import Iterable
from pathlib import Path

from kvjax.store.disk_index import DiskIndex

PINS = "pins"  # a folder beside those of the blocks, which the listing brings to the index as it does theirs


class DiskPins:
    """Keys of blocks that must not leave. Whoever changes them holds the folder's lock, and lists it afterwards."""

    def __init__(self, base: Path, index: DiskIndex) -> None:
        self._folder, self._index = base / PINS, index

    def __contains__(self, key: str) -> bool:
        return key in self._index.names(PINS)

    def add(self, keys: Iterable[str]) -> None:
        """Pins blocks. Raises OSError."""
        self._folder.mkdir(exist_ok=True, mode=0o700)
        for key in keys:
            (self._folder / key).touch(mode=0o600)

    def remove(self, keys: Iterable[str]) -> None:
        """Ends pins; no effect on keys without one. Raises OSError."""
        for key in keys:
            (self._folder / key).unlink(missing_ok=True)

    def forget_absent(self) -> None:
        """Ends the pins of blocks that are not here. Raises OSError."""
        self.remove([key for key in self._index.names(PINS) if not self._index.knows(key)])
