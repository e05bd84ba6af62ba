"""Counters of an engine, as its thread counts; `EngineStats` has them by the same names."""

import dataclasses

from kvjax.engine.request import Finish


@dataclasses.dataclass
class EngineCounters:
    """Only the engine's thread changes them, but for `submitted`, which the engine's lock guards."""

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

    def ended(self, finish: Finish) -> None:
        """A request has ended."""
        match finish:
            case Finish.CANCELLED:
                self.cancelled += 1
            case Finish.ERROR:
                self.failed += 1
            case _:
                self.finished += 1

    def check_integrity(self) -> None:
        """Raises AssertionError unless every request has ended."""
        assert self.submitted == self.finished + self.cancelled + self.failed, self
