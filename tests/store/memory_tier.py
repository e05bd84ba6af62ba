"""The reference: a tier that is a dictionary."""

import threading
from collections.abc import Iterator

from kvjax.store.names import object_name
from kvjax.store.tier import Stored, Tier, TierError


class MemoryTier(Tier):
    """Does what the contract says and nothing else; what every other tier is compared with."""

    name = "memory"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, key: str, into: memoryview) -> bool:
        with self._lock:
            self._check(key)
            blob = self._objects.get(key)
        if blob is None:
            return False
        if len(blob) != into.nbytes:
            raise TierError("length", f"{key} has {len(blob)} bytes, expected {into.nbytes}")
        into[:] = blob
        return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        with self._lock:
            self._check(key)
            self._objects[key] = bytes(blob)

    def contains(self, key: str) -> bool:
        with self._lock:
            self._check(key)
            return key in self._objects

    def delete(self, key: str) -> None:
        with self._lock:
            self._check(key)
            self._objects.pop(key, None)

    def scan(self) -> Iterator[Stored]:
        with self._lock:
            self._check()
            return iter([Stored(key, len(blob)) for key, blob in self._objects.items()])

    def close(self) -> None:
        self._closed = True

    def _check(self, key: str | None = None) -> None:
        if self._closed:
            raise TierError("refused", "closed")
        if key is not None:
            object_name(key)
