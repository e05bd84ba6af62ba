"""Who is served next: a queue, the slots, and at most one prompt on its way through the layers. No arrays.

First come, first served, but for those whose stored KV is still on its way: a request takes the first free slot and
keeps it until it ends. The engine runs one unit of prefill between two decode dispatches, so running requests go on
while a long prompt is read.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(eq=False)
class Scheduler[R]:
    """Not safe for use from several threads: the engine's lock guards it.

    Attributes:
        slots: who holds each slot; None where it is free.
        prefilling: the slot whose prompt is being read, None if there is none.
    """

    num_slots: int
    waiting: collections.deque[R] = dataclasses.field(default_factory=collections.deque)
    slots: list[R | None] = dataclasses.field(default_factory=list)
    prefilling: int | None = None

    def __post_init__(self) -> None:
        self.slots = [None] * self.num_slots

    @property
    def idle(self) -> bool:
        return not self.requests

    @property
    def running(self) -> list[R]:
        """Requests that hold a slot."""
        return [request for request in self.slots if request is not None]

    @property
    def requests(self) -> list[R]:
        """All that have not ended: those that wait, and those that hold a slot."""
        return [*self.waiting, *self.running]

    @property
    def decoding(self) -> dict[int, R]:
        """Slots whose prompt is done, and who holds them."""
        everyone = {slot: held for slot, held in enumerate(self.slots) if held is not None}
        return {slot: held for slot, held in everyone.items() if slot != self.prefilling}

    def submit(self, request: R) -> None:
        self.waiting.append(request)

    def admit(
        self, ready: Callable[[R], bool] = lambda request: True, suspended: Sequence[int] = ()
    ) -> tuple[int, R] | None:
        """Gives the first request that is `ready` a slot and starts its prefill; None if there is none, or no slot.

        Of the free slots those that are `suspended` are taken last, and in this order.
        """
        request = next(filter(ready, self.waiting), None)
        if self.prefilling is not None or request is None or None not in self.slots:
            return None
        free = [slot for slot, held in enumerate(self.slots) if held is None and slot not in suspended]
        self.waiting.remove(request)
        slot = [*free, *suspended][0]
        self.slots[slot], self.prefilling = request, slot
        return slot, request

    def resume(self, request: R, slot: int) -> None:
        """Gives a waiting request a free slot, in which it decodes at once."""
        assert self.slots[slot] is None, "the slot is held"
        self.waiting.remove(request)
        self.slots[slot] = request

    def prefilled(self) -> None:
        """The prompt is done: its slot decodes from now on."""
        assert self.prefilling is not None
        self.prefilling = None

    def remove(self, request: R) -> int | None:
        """Takes a request out, wherever it is; returns the slot it held, None if it was waiting or is not here."""
        if request in self.waiting:
            self.waiting.remove(request)
            return None
        if request not in self.slots:
            return None
        slot = self.slots.index(request)
        self.slots[slot] = None
        if self.prefilling == slot:
            self.prefilling = None
        return slot

    def check_integrity(self) -> None:
        """Raises AssertionError if a request is in two places, or a prefill has no slot."""
        everyone: list[Any] = [*self.waiting, *self.running]
        assert len(everyone) == len({id(request) for request in everyone}), "a request is in two places"
        assert len(self.slots) == self.num_slots
        assert self.prefilling is None or self.slots[self.prefilling] is not None, "a prefill without a slot"
