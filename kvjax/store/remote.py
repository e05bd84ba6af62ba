"""Remote tiers: a name, a place that may be printed, and an end, which all tiers behind a network share."""

import math
import threading

from kvjax.store.names import object_name
from kvjax.store.tier import Reason, Tier, TierError


class Remote(Tier):
    """A tier whose objects are called `ab/abcdef...`, under the prefix of a URL.

    Its calls take about `timeout` seconds at most where its library can be held to that; `Guarded` holds it.

    Attributes:
        where: the URL without what is secret in it, for errors.
        timeout: seconds.
    """

    name = "remote"

    def __init__(self, where: str, timeout: float) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be above 0 s and finite, not {timeout}")
        self.where = where
        self.timeout = timeout
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise self._error("refused", "closed")

    def _name(self, key: str) -> str:
        """The object's name, while the tier is open."""
        self._check_open()
        return object_name(key)

    def _error(self, reason: Reason, what: object) -> TierError:
        return TierError(reason, f"{self.where}: {what}")

    def _wrong_length(self, key: str, has: int | str, expected: int) -> TierError:
        return self._error("length", f"{key} has {has} bytes, expected {expected}")
