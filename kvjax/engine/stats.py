"""Engine statistics: one frozen snapshot of what it is doing, for metrics, logs and the page. No live objects."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class SlotStats:
    """One slot: `tokens` are those in its context so far; `progress` is the share of its prompt that is done.

    A suspended one holds a conversation that no request has gone on with yet.
    """

    state: Literal["free", "prefill", "decode", "suspended"]
    request_id: str = ""
    tokens: int = 0
    progress: float = 0.0


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine; counters only grow, from zero at start.

    Attributes:
        waiting: requests in the queue; `running` are those prefilling or decoding.
        suspended: conversations from before a restart that no request has gone on with yet.
        decode_steps: steps over all slots; `busy_seconds` is the time the engine's thread had work.
        compiles_after_warmup: stays 0 in a healthy server: every shape was compiled before it was ready.
    """

    slots: tuple[SlotStats, ...] = ()
    waiting: int = 0
    running: int = 0
    suspended: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prefill_units: int = 0
    decode_steps: int = 0
    busy_seconds: float = 0.0
    compiles_after_warmup: int = 0
