"""Work: what the scheduler gives out, one piece at a time, and the loop executes.

A further kind is one more dataclass here, one more case of `Scheduler.next` and one more of `EngineLoop._execute`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Admit[R]:
    """A waiting request takes a slot and its prefill begins; a conversation suspended there makes way."""

    slot: int
    request: R


@dataclasses.dataclass(frozen=True)
class Resume[R]:
    """A waiting request goes on with the conversation suspended in a slot, which decodes from now on."""

    slot: int
    request: R


@dataclasses.dataclass(frozen=True)
class PrefillChunk[R]:
    """One unit of the prompt being read in a slot; after the last one `Scheduler.prefilled` is due."""

    slot: int
    request: R


@dataclasses.dataclass(frozen=True)
class DecodeSteps[R]:
    """One dispatch of at most `count` decode steps for the requests in these slots."""

    slots: dict[int, R]
    count: int


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing to run for `seconds`, or until something changes; None: until something changes."""

    seconds: float | None = None


type Work[R] = Admit[R] | Resume[R] | PrefillChunk[R] | DecodeSteps[R] | Wait
