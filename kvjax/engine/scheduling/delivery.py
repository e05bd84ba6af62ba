"""Delivery: reads finished dispatches and hands their tokens to the requests; ends requests, whichever way."""

import collections
import logging
from collections.abc import Callable

import jax
import numpy as np

from kvjax.engine.active_request import ActiveRequest, CallerGoneError
from kvjax.engine.device.sampling import TokenSample, token_logprobs
from kvjax.engine.device.steps import Steps
from kvjax.engine.request import ConstraintError, Finish
from kvjax.engine.scheduling.counters import EngineCounters
from kvjax.engine.scheduling.pending import Pending

logger = logging.getLogger(__name__)


class Delivery:
    """Of one engine's thread, which alone calls it.

    Args:
        leave: takes a request out of the scheduler and its slot.
    """

    def __init__(self, counters: EngineCounters, leave: Callable[[ActiveRequest], None]) -> None:
        self._counters, self._leave = counters, leave
        self._pending: collections.deque[Pending] = collections.deque()

    def __len__(self) -> int:
        """Dispatches that are not read yet."""
        return len(self._pending)

    def steps(self, out: Steps, holders: dict[int, ActiveRequest]) -> None:
        """A decode dispatch is on its way."""
        self._pending.append(Pending(out.emitted, out.sample, holders))

    def first_token(self, sample: TokenSample, request: ActiveRequest) -> None:
        """The draw of a request's first token is on its way."""
        self._pending.append(Pending(None, sample, {0: request}))

    def collect(self, keep: int) -> None:
        """Reads dispatches, all but the last `keep`, and hands their tokens out. Waits for the device."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            emitted, sample = pending.read()
            if pending.emitted is not None:
                self._counters.decode_steps += int(emitted.any(axis=1).sum())
            for column, request in pending.holders.items():
                if not request.finished:
                    self._hand_out(request, column, emitted, sample)

    def constrained(
        self, slots: dict[int, ActiveRequest], constrain: Callable[[int, np.ndarray], None]
    ) -> dict[int, ActiveRequest]:
        """Tells the device what the requests of `slots` may draw next; returns them without those that now end.

        Args:
            constrain: sets the mask of a slot.
        """
        going_on = {}
        for slot, request in slots.items():
            try:
                if request.constraint is not None:
                    constrain(slot, request.constraint.mask())
                going_on[slot] = request
            except ConstraintError as error:
                self.end(request, Finish.ERROR, str(error))
        return going_on

    def drop(self) -> None:
        """Forgets what is not read."""
        self._pending.clear()

    def hand_over(self, request: ActiveRequest, accept: Callable[[], None]) -> bool:
        """Has a request take tokens; it leaves if it is done or cannot. Returns whether it could."""
        try:
            accept()
        except CallerGoneError:
            self.end(request, Finish.CANCELLED)
            return False
        except Exception:
            logger.exception("request %s failed", request.request_id)
            self.end(request, Finish.ERROR, "the request failed while its text was being written")
            return False
        if request.finished:
            self._leave(request)
            self._counters.finished += 1
        return True

    def end(self, request: ActiveRequest, finish: Finish, error: str | None = None) -> None:
        """Takes a request out and sends its last delta, if that is not out yet."""
        self._leave(request)
        try:
            request.end(finish, error)
        except Exception:  # its caller has gone
            logger.debug("the end of request %s could not be delivered", request.request_id, exc_info=True)
        self._counters.ended(finish)

    def _hand_out(self, request: ActiveRequest, column: int, emitted: np.ndarray, sample: TokenSample) -> None:
        rows = jax.tree.map(lambda x: x[emitted[:, column], column], sample)
        tokens = rows.token.tolist()
        if not tokens:
            return
        alternatives, before = request.params.logprobs, request.generated
        logprobs = lambda: () if alternatives is None else token_logprobs(rows, alternatives)  # noqa: E731
        if self.hand_over(request, lambda: request.accept(tokens, logprobs())):
            self._counters.generated_tokens += request.generated - before
