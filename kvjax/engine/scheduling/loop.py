"""Engine loop: the engine's thread, which asks the scheduler for work, executes it, and hands tokens out.

    any thread                    engine thread                            device
    submit, cancel --(lock)--> scheduler.next --> runner.decode, advance --> steps
                                  ^                                          |
    on_delta(delta)  <------------ delivery  <------- arrays that fill later --+

The thread dispatches the next decode steps before it reads the last ones, so the device never waits for
detokenising. A slot that a request has left may therefore still be computed once: its tokens are dropped, and
`alive` stops the slot on the device before anything else is written to it.
"""

import dataclasses
import functools
import logging
import threading
import time

import numpy as np

from kvjax.engine.active_request import ActiveRequest
from kvjax.engine.device.runner import Runner
from kvjax.engine.kv.transfers import KVTransfers
from kvjax.engine.request import Finish
from kvjax.engine.scheduling.counters import EngineCounters
from kvjax.engine.scheduling.delivery import Delivery
from kvjax.engine.scheduling.prompt_reader import PromptReader
from kvjax.engine.scheduling.scheduler import Scheduler
from kvjax.engine.scheduling.work import Admit, DecodeSteps, PrefillChunk, Resume, Wait, Work
from kvjax.engine.sessions.conversation import Conversation
from kvjax.engine.sessions.snapshot import SessionSnapshot
from kvjax.engine.sessions.suspended import SuspendedSlots
from kvjax.engine.stats import EngineStats, SlotStats

logger = logging.getLogger(__name__)


class EngineLoop:
    """Owns the runner. `submit`, `cancel`, `suspend`, `stats` and `stop` may be called from any thread.

    Args:
        transfers: the runner's KV to and from the store.
        suspended: conversations of an earlier engine, in the runner's slots.

    Attributes:
        failure: what ended the thread, if not `stop`. Every request has then got an error.
    """

    def __init__(self, runner: Runner, transfers: KVTransfers, suspended: SuspendedSlots) -> None:
        self._runner, self._transfers, self._suspended = runner, transfers, suspended
        self._condition = threading.Condition()
        layout = runner.layout
        self._scheduler = Scheduler[ActiveRequest](layout.max_num_seqs, layout.decode_steps, suspended)
        self._counters = EngineCounters()
        self._delivery = Delivery(self._counters, self._leave)
        self._reader: PromptReader | None = None
        self._cancelled: list[ActiveRequest] = []
        self._suspending = False  # requested
        self._snapshots: list[SessionSnapshot] = []
        self._stopping = self._working = self._ended = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvjax-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: ActiveRequest) -> None:
        params = request.params
        with self._condition:
            suspended = self._suspended.find(request) is not None
        if params.prompt_logprobs is None and not suspended:  # which need the hidden state of every token
            request.prefix = self._transfers.lookup(
                request.prompt, params.compress_after, request.cache_salt, request.for_store.decoding, self._wake
            )
        with self._condition:
            refused = self.failure is not None or self._stopping
            if not refused:
                self._scheduler.submit(request)
                self._counters.submitted += 1
                self._condition.notify_all()
        if refused:
            self._transfers.release(request.prefix)
            request.end(Finish.ERROR, "the engine has stopped")

    def cancel(self, request: ActiveRequest) -> None:
        """Requests that a request is taken out; its last delta says so. No effect on a finished one."""
        with self._condition:
            request.cancelled = True
            self._cancelled.append(request)
            self._condition.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Waits until nothing is left to do or to deliver; returns whether it came in `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: self._ended or self._idle, timeout)

    def cancel_all(self) -> None:
        with self._condition:
            for request in self._scheduler.requests:
                self.cancel(request)

    def suspend(self, timeout: float) -> list[SessionSnapshot]:
        """As `cancel_all`, but keeps the conversations that decode: returns these and what was suspended before.

        Blocks until every request has ended, or for `timeout` seconds: then it returns nothing. Nothing may be
        submitted afterwards.
        """
        with self._condition:
            self._suspending = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._ended or not self._suspending, timeout)
            return self._snapshots

    def stop(self, timeout: float) -> bool:
        """Ends the thread, and requests still there with an error; returns whether it ends in `timeout` seconds."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def stats(self) -> EngineStats:
        with self._condition:
            return EngineStats(
                slots=tuple(
                    _slot_stats(request, self._suspended.tokens(slot), slot == self._scheduler.prefilling, self._reader)
                    for slot, request in enumerate(self._scheduler.slots)
                ),
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                suspended=len(self._suspended),
                **dataclasses.asdict(self._counters),
            )

    def check_integrity(self) -> None:
        """Raises AssertionError on contradictions. Only for an idle engine: it looks at the device."""
        with self._condition:
            self._scheduler.check_integrity()
            assert self._scheduler.idle, "requests are left"
            assert self._reader is None, "a prefill is left"
            assert not self._delivery, "results are left unread"
            self._counters.check_integrity()
            self._transfers.check_integrity()
            self._runner.check_integrity()
            self._suspended.check_integrity()

    @property
    def _interrupted(self) -> bool:
        return bool(self._cancelled or self._suspending or self._stopping)

    @property
    def _idle(self) -> bool:
        return not (self._working or self._interrupted or self._delivery) and self._scheduler.idle

    def _run(self) -> None:
        try:
            while not self._stopping:
                began = time.monotonic()
                self._end_cancelled()
                if self._suspending:
                    self._suspend()
                work, conversation = self._next()
                if work is not None:
                    self._execute(work, conversation)
                    self._delivery.collect(keep=0 if isinstance(work, Wait) or self._scheduler.stepwise else 1)
                    self._counters.busy_seconds += time.monotonic() - began
        except BaseException as error:  # the thread's last act: no caller may wait for ever
            logger.critical("the engine's thread ended", exc_info=error)
            self.failure = error
        finally:
            self._end_all()

    def _next(self) -> tuple[Work[ActiveRequest] | None, Conversation | None]:
        """The next work, with the conversation suspended in its slot; waits, and returns None, if there is none."""
        with self._condition:
            work = self._scheduler.next(time.monotonic())
            if isinstance(work, Wait) and not self._delivery:
                self._working = False
                self._condition.notify_all()  # for `wait_idle`
                if not self._interrupted:
                    self._condition.wait(work.seconds)
                self._working = True
                return None, None
            self._working = True
            return work, self._suspended.drop(work.slot) if isinstance(work, Admit | Resume) else None

    def _execute(self, work: Work[ActiveRequest], conversation: Conversation | None) -> None:
        match work:
            case Resume(slot, request):
                assert conversation is not None
                self._resume(slot, request, conversation)
            case Admit(slot, request):
                if conversation is not None:
                    logger.info("a suspended conversation of %d tokens makes way", conversation.position + 1)
                request.scheduled()
                self._reader = PromptReader(self._runner, self._transfers, self._counters, request, slot)
            case DecodeSteps(slots, count):
                self._decode(slots, count)
            case PrefillChunk(_, request):
                self._advance(request)

    def _resume(self, slot: int, request: ActiveRequest, conversation: Conversation) -> None:
        """A request goes on with a suspended conversation: nothing is computed, so nothing needs to be loaded."""
        self._transfers.release(request.prefix)
        request.prefix = None
        self._suspended.wake(slot)
        self._delivery.hand_over(request, functools.partial(conversation.hand_over, request))
        self._counters.prompt_tokens += len(request.prompt)
        self._counters.cached_tokens += request.cached_tokens

    def _decode(self, slots: dict[int, ActiveRequest], count: int) -> None:
        slots = self._delivery.constrained(slots, self._runner.constrain)
        alive = np.zeros(self._runner.layout.max_num_seqs, np.bool_)
        alive[list(slots)] = True
        if self._reader is not None:
            self._reader.interrupted()
        self._transfers.before_steps(alive, count)
        self._delivery.steps(self._runner.decode(alive, count), slots)

    def _advance(self, request: ActiveRequest) -> None:
        """Runs one unit of the prompt being read; after the last the request decodes."""
        reader = self._reader
        assert reader is not None
        if not reader.advance():
            return
        reader.finish()
        self._reader = None
        if request.limit == 0:
            self._delivery.end(request, Finish.LENGTH)
            return
        self._delivery.first_token(reader.first_token(), request)
        with self._condition:
            self._scheduler.prefilled()

    def _end_cancelled(self) -> None:
        with self._condition:
            cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            if not request.finished:
                self._delivery.end(request, Finish.CANCELLED)

    def _suspend(self) -> None:
        self._delivery.collect(keep=0)  # so that the host knows of every token that the slots have drawn
        with self._condition:
            requests = self._scheduler.requests
            self._suspended.cut_off(self._scheduler.decoding)
        self._snapshots = self._suspended.take()
        for request in requests:
            self._delivery.end(request, Finish.CANCELLED)
        self._suspending = False
        self._wake()

    def _leave(self, request: ActiveRequest) -> None:
        """Takes a request out of the scheduler, with all that is held for it."""
        reader = None
        with self._condition:
            slot = self._scheduler.remove(request)
            if slot is not None and self._scheduler.prefilling is None:
                reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        if slot is not None:
            self._transfers.leave(slot)
        self._transfers.release(request.prefix)

    def _end_all(self) -> None:
        """The thread ends: every request gets an error. Nothing touches the device any more."""
        with self._condition:
            requests = self._scheduler.requests
            for request in requests:
                self._scheduler.remove(request)
            reader, self._reader = self._reader, None
            self._delivery.drop()
        if reader is not None:
            reader.close()
        for request in requests:
            self._delivery.end(request, Finish.ERROR, "the engine has stopped")
        with self._condition:
            self._working = False
            self._ended = True
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()


def _slot_stats(
    request: ActiveRequest | None, suspended: int | None, prefilling: bool, reader: PromptReader | None
) -> SlotStats:
    if request is None:
        return SlotStats("free") if suspended is None else SlotStats("suspended", tokens=suspended)
    if prefilling:
        done = 0.0 if reader is None else reader.progress
        return SlotStats("prefill", request.request_id, round(done * len(request.prompt)), done)
    return SlotStats("decode", request.request_id, len(request.prompt) + request.generated, 1.0)
