"""Tier: immutable objects by key, in memory, on a disk or behind a network.

A tier says nothing of what the bytes mean and verifies nothing: its reader does. It may be used from several threads.
Objects form chains: each may name the object before it, its parent, without which nobody can use it. A tier that
evicts lets a key leave only after all that descend from it.
"""

import abc
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Reason = Literal["refused", "timeout", "length", "io", "full", "breaker"]


class TierError(Exception):
    """A tier could not do what was asked. The caller goes on without it: what is not read is computed.

    Attributes:
        reason: for metrics, one of few.
        finished: set once the call no longer touches memory that it was given, where it was given up before that;
            None where it has ended.
    """

    def __init__(self, reason: Reason, message: str, finished: threading.Event | None = None) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.finished = finished


@dataclasses.dataclass(frozen=True)
class Stored:
    """One object of a tier.

    Attributes:
        nbytes: its length; 0 where the tier does not know it without reading it.
        used: when it was last read or written, in seconds since 1970; 0 where the tier does not know.
    """

    key: str
    nbytes: int
    used: float = 0.0


class Tier(abc.ABC):
    """A place for objects. Keys are lower-case hexadecimal digits; objects never change, a write may only repeat one.

    Attributes:
        name: in logs and metrics, as "host", "disk", "remote"; a store gives each of its tiers a name of its own.
        read_only: whether `write`, `delete`, `pin` and `unpin` are refused.
        evicts: whether it makes room by an order of last use, which `touch` renews.
    """

    name: str
    read_only: bool = False
    evicts: bool = False

    @abc.abstractmethod
    def read(self, key: str, into: memoryview) -> bool:
        """Fills `into`, which is exactly as long as the object ought to be; returns whether the object is there.

        Raises:
            TierError: it is there and could not be read, is longer or shorter, or nobody can say.
        """

    @abc.abstractmethod
    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        """Stores an object: either whole, and readable from now on, or not at all.

        Args:
            parent: key of the object before it in its chain; "" for none. A tier that evicts never lets an ancestor of
                what it writes leave for it.

        Raises:
            TierError: it is not stored.
        """

    @abc.abstractmethod
    def contains(self, key: str) -> bool:
        """Whether an object is there, without reading it.

        Raises:
            TierError: nobody can say.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; one that is not there is no error.

        Raises:
            TierError: it may still be there.
        """

    def reject(self, key: str) -> None:
        """Reports an object that was read and is not what its key says: it shall not be read again.

        It is removed; a read-only tier takes it for missing for a while instead, if it remembers that.

        Raises:
            TierError: it may still be there.
        """
        if not self.read_only:
            self.delete(key)

    @abc.abstractmethod
    def scan(self) -> Iterator[Stored]:
        """Every object that can be read, in no order.

        Raises:
            TierError: the tier cannot list what it holds.
        """

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        """As `contains`, for many keys in few round trips.

        Raises:
            TierError: nobody can say of any of them.
        """
        return [self.contains(key) for key in keys]

    def touch(self, keys: Sequence[str]) -> list[bool]:
        """Counts the objects of one chain, from its beginning on, as used now: its end shall leave first.

        Returns which of them are there. A tier without an order of its own only says that.

        Raises:
            TierError: nobody can say.
        """
        return self.contains_many(keys)

    def pin(self, keys: Sequence[str]) -> list[bool]:
        """Keeps objects from being evicted until `unpin`; returns which of them are there and pinned now.

        Raises:
            TierError: "refused", where the tier evicts by rules of its own; or as `contains`.
        """
        raise TierError("refused", f"the {self.name} tier cannot pin objects")

    def unpin(self, keys: Sequence[str]) -> None:
        """Ends `pin`; no effect on keys that are not pinned.

        Raises:
            TierError: as `pin`.
        """
        raise TierError("refused", f"the {self.name} tier cannot pin objects")

    def peek(self, key: str, nbytes: int) -> bytes | None:
        """The first bytes of an object, fewer where it is shorter; None if it is not there. For tools, not for speed.

        Raises:
            TierError: as `read`; or the tier cannot do this.
        """
        blob = self.load(key)
        return None if blob is None else blob[:nbytes]

    def load(self, key: str) -> bytes | None:
        """A whole object of a length that nobody knows before; None if it is not there. For tools, not for speed.

        Raises:
            TierError: as `read`; or the tier cannot do this.
        """
        for stored in self.scan():
            if stored.key == key and stored.nbytes:
                blob = bytearray(stored.nbytes)
                return bytes(blob) if self.read(key, memoryview(blob)) else None
        return None

    def held(self) -> dict[str, Any]:
        """What the tier knows of its state, by the names of `TierStats`; {} where it knows nothing."""
        return {}

    def close(self) -> None:  # noqa: B027  # most tiers hold nothing open
        """Lets go of files and connections. No call may follow."""
