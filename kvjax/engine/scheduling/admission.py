"""Admission: counts the places that requests may take, slots and queue together, so overload is refused at once."""

import contextlib
import threading
from collections.abc import Iterator

from kvjax.engine.request import QueueFullError


class Admission:
    """Safe to use from any thread."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    def reserve(self, count: int) -> "Reservation":
        """Takes `count` places or raises QueueFullError; they are given back when the reservation is left."""
        with self._changed:
            if self._closed:
                raise QueueFullError("the engine is shutting down")
            if self._taken + count > self._places:
                raise QueueFullError(
                    f"{self._taken} of {self._places} places are taken, {count} more are asked for; try again later"
                )
            self._taken += count
        return Reservation(self, count)

    @contextlib.contextmanager
    def place(self, reservation: "Reservation | None") -> Iterator[None]:
        """Uses one place of a reservation, or one that is free, until this context is left; raises as `reserve`."""
        if reservation is not None:
            with reservation.use():
                yield
        else:
            with self.reserve(1) as own, own.use():
                yield

    def close(self) -> None:
        """Refuses every reservation from now on."""
        self._closed = True

    def give_back(self, count: int) -> None:
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def wait_empty(self, timeout: float) -> bool:
        """Waits until all places are given back; returns whether that came within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._taken == 0, timeout)

    def check_integrity(self) -> None:
        assert self._taken == 0, f"{self._taken} places are still taken"


class Reservation:
    """Places held for one caller. As a context manager it gives back, on leaving, those that are not used."""

    def __init__(self, admission: Admission, count: int) -> None:
        self._admission = admission
        self._unused = count

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *error: object) -> None:
        self._admission.give_back(self._unused)
        self._unused = 0

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Uses one place, which is given back when this context is left.

        Raises:
            QueueFullError: all of the places are used already.
        """
        if self._unused == 0:
            raise QueueFullError("the reservation has no place left: reserve one for each request")
        self._unused -= 1
        try:
            yield
        finally:
            self._admission.give_back(1)
