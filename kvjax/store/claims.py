"""Claims: keys that threads work on, each one thread at a time."""

import contextlib
import threading
from collections.abc import Iterator

from kvjax.store.tier import TierError


class Claims:
    """The keys that are claimed now. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._keys: set[str] = set()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    @contextlib.contextmanager
    def hold(self, key: str, seconds: float) -> Iterator[None]:
        """Keeps other threads from the same key.

        Raises:
            TierError: another thread has held it for `seconds` ("timeout").
        """
        with self._changed:
            if not self._changed.wait_for(lambda: key not in self._keys, seconds):
                raise TierError("timeout", f"{key}: another thread has been writing it for {seconds:g} s")
            self._keys.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._keys.discard(key)
                self._changed.notify_all()
