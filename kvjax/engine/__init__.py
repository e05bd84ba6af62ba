"""Engine: prompts in, tokens out. The scheduler, the compiled steps, sampling, and the `Engine` in front of them."""

from kvjax.engine.config import EngineConfig
from kvjax.engine.engine import Engine
from kvjax.engine.request import (
    Completion,
    ContextLengthExceededError,
    Delta,
    EngineDeadError,
    Finish,
    QueueFullError,
    RequestFailedError,
    SamplingParams,
    Timing,
    TokenLogprob,
)
from kvjax.engine.stats import EngineStats, SlotStats

__all__ = [
    "Completion",
    "ContextLengthExceededError",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "Finish",
    "QueueFullError",
    "RequestFailedError",
    "SamplingParams",
    "SlotStats",
    "Timing",
    "TokenLogprob",
]
