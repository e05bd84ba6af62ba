"""Compile counter: counts XLA compilations, to show that a server which has warmed up compiles nothing."""

from typing import Any

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts from `start` to `stop`, over the whole process: JAX has one compiler."""

    def __init__(self) -> None:
        self.count = 0
        self._listening = False

    def start(self) -> None:
        if not self._listening:
            jax.monitoring.register_event_duration_secs_listener(self._count)
            self._listening = True

    def stop(self) -> None:
        if self._listening:
            jax.monitoring.unregister_event_duration_listener(self._count)
            self._listening = False

    def _count(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == _EVENT
