"""Scheduler: the whole policy of what runs next. No arrays, no threads, no clock of its own.

    resume     a request whose conversation is suspended goes on with it at once, in the slot where it stands
    admit      the first waiting request that is ready takes a free slot, if no other prompt is being read;
               slots with a suspended conversation are taken last, in their order
    decode     between any two units of a prefill; while a prompt is read one step at a time, for more would end early
               requests before the others join them, and while a request follows a grammar, whose next token has to be
               known
    prefill    one unit of the prompt that is being read
    wait       until the first waiting request stops waiting for its stored KV

First come, first served, but for those whose stored KV is still on its way. A request keeps its slot until it ends.
"""

import collections
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from kvjax.engine.scheduling.work import Admit, DecodeSteps, PrefillChunk, Resume, Wait, Work


@runtime_checkable
class Schedulable(Protocol):
    """A request, as far as the scheduler looks at it."""

    @property
    def ready_at(self) -> float:
        """When it stops waiting for its stored KV, by the clock of `Scheduler.next`; 0 if there is none to wait for."""
        ...

    @property
    def stepwise(self) -> bool:
        """Whether each of its tokens has to be known before the next is drawn."""
        ...

    def refresh(self) -> bool:
        """Its turn has come: it looks again for what others have computed; returns whether it waits for that."""
        ...


@runtime_checkable
class Suspended[R](Protocol):
    """Conversations that stand still in free slots."""

    @property
    def slots(self) -> Sequence[int]:
        """In the order in which they may be taken."""
        ...

    def find(self, request: R) -> int | None:
        """The slot whose conversation a request goes on with; None if there is none."""
        ...


class NoneSuspended:
    """For engines in which no conversation is ever suspended."""

    slots: Sequence[int] = ()

    def find(self, request: Any) -> int | None:
        return None


class Scheduler[R: Schedulable]:
    """Not safe for use from several threads: the engine's lock guards it.

    Attributes:
        waiting: requests without a slot, the first come first.
        slots: the request that holds each slot; None where it is free.
        prefilling: the slot whose prompt is being read; None if there is none.
    """

    def __init__(self, num_slots: int, decode_steps: int = 1, suspended: Suspended[R] | None = None) -> None:
        self.waiting: collections.deque[R] = collections.deque()
        self.slots: list[R | None] = [None] * num_slots
        self.prefilling: int | None = None
        self._decode_steps = decode_steps
        self._suspended: Suspended[R] = suspended or NoneSuspended()
        self._decode_due = True  # before the next unit of the prefill

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
        """Slots whose prompt is done, with their requests."""
        held = {slot: request for slot, request in enumerate(self.slots) if request is not None}
        return {slot: request for slot, request in held.items() if slot != self.prefilling}

    @property
    def stepwise(self) -> bool:
        """Whether a step has to be read before the next one begins: a grammar goes on from the token drawn."""
        return any(request.stepwise for request in self.decoding.values())

    def submit(self, request: R) -> None:
        self.waiting.append(request)

    def next(self, now: float) -> Work[R]:
        """What runs next, at the time `now`. A request that it admits or resumes holds its slot from now on."""
        if (work := self._resume()) or (work := self._admit(now)):
            self._decode_due = True
            return work
        if (decoding := self.decoding) and (self.prefilling is None or self._decode_due):
            self._decode_due = False
            return DecodeSteps(decoding, 1 if self.stepwise or self.prefilling is not None else self._decode_steps)
        if self.prefilling is not None and (request := self.slots[self.prefilling]) is not None:
            self._decode_due = True
            return PrefillChunk(self.prefilling, request)
        return Wait(min((max(request.ready_at - now, 0.0) for request in self.waiting), default=None))

    def _resume(self) -> Resume[R] | None:
        for request in self.waiting if self._suspended.slots else ():
            slot = self._suspended.find(request)
            if slot is not None and self.slots[slot] is None:
                self._place(request, slot)
                return Resume(slot, request)
        return None

    def _admit(self, now: float) -> Admit[R] | None:
        free = [slot for slot, request in enumerate(self.slots) if request is None]
        if not free or self.prefilling is not None:
            return None
        ready = next((each for each in self.waiting if each.ready_at <= now and not each.refresh()), None)
        if ready is None:
            return None
        suspended = [slot for slot in self._suspended.slots if slot in free]
        slot = [*(slot for slot in free if slot not in suspended), *suspended][0]
        self._place(ready, slot)
        self.prefilling = slot
        return Admit(slot, ready)

    def _place(self, request: R, slot: int) -> None:
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
        if request not in self.slots:
            return None
        slot = self.slots.index(request)
        self.slots[slot] = None
        if self.prefilling == slot:
            self.prefilling = None
        return slot

    def check_integrity(self) -> None:
        """Raises AssertionError if a request is in two places, or a prefill has no slot."""
        identities = [id(request) for request in self.requests]
        assert len(identities) == len(set(identities)), "a request is in two places"
        assert self.prefilling is None or self.slots[self.prefilling] is not None, "a prefill without a slot"
