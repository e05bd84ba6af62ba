"""The engine's thread: takes requests from the queue, feeds the device, and hands tokens out.

    any thread                    engine thread                          device
    submit, cancel --(lock)--> scheduler --> runner.decode, advance --> steps
                                  ^                                       |
    on_delta(delta)  <------------ collect  <------- arrays that fill later --+

The thread dispatches the next decode steps before it reads the last ones, so the device never waits for
detokenising. A slot that a request has left may therefore still be computed once: its tokens are dropped, and the
slot's state on the device is told by `alive` before anything else is written to it.
"""

import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from kvjax.engine.pending import Pending
from kvjax.engine.prefill import Prefill
from kvjax.engine.request import Finish, TokenLogprob
from kvjax.engine.runner import Runner
from kvjax.engine.sampling import TokenSample, token_logprobs
from kvjax.engine.scheduler import Scheduler
from kvjax.engine.sequence import ActiveRequest, CallerGoneError
from kvjax.engine.sessions import SessionSnapshot
from kvjax.engine.stats import EngineStats, SlotStats
from kvjax.engine.suspended import SuspendedSlots
from kvjax.store.keys import BLOCK_TOKENS

logger = logging.getLogger(__name__)


class EngineLoop:
    """Owns the runner. `submit`, `cancel`, `session_dir`, `stats` and `stop` may be called from any thread.

    Args:
        suspended: conversations of an earlier engine, in the runner's slots.

    Attributes:
        failure: what ended the thread, if not `stop`. Every request has then got an error.
    """

    def __init__(self, runner: Runner, suspended: SuspendedSlots | None = None) -> None:
        self._runner = runner
        self._suspended = SuspendedSlots(runner) if suspended is None else suspended
        self._suspending = False  # asked for
        self._saved: list[SessionSnapshot] = []
        self._condition = threading.Condition()
        self._scheduler: Scheduler[ActiveRequest] = Scheduler(runner.layout.max_num_seqs)
        self._cancelled: list[ActiveRequest] = []
        self._pending: collections.deque[Pending] = collections.deque()
        self._prefill: Prefill | None = None
        self._unit: tuple[int, float] | None = None  # a chunk that alone is being computed, and since when
        self._scores: list[TokenLogprob] = []  # of the prompt being read, if they are asked for
        self._stopping = False
        self._working = False
        self._ended = False
        self._stats = EngineStats()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvjax-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: ActiveRequest) -> None:
        params = request.params
        with self._condition:
            suspended = self._suspended.find(request) is not None
        if params.prompt_logprobs is None and not suspended:  # which need the hidden state of every token
            request.fetch = self._runner.fetch(
                request.prompt, params.compress_after, request.cache_salt, self._wake, request.answer.decoding
            )
        with self._condition:
            refused = self.failure is not None or self._stopping
            if not refused:
                self._scheduler.submit(request)
                self._count(submitted=1)
                self._condition.notify_all()
        if refused:
            if request.fetch is not None:
                request.fetch.close()
            request.end(Finish.ERROR, "the engine has stopped")

    def cancel(self, request: ActiveRequest) -> None:
        """Asks for a request to be taken out; its last delta says so. No effect on a finished one."""
        with self._condition:
            request.cancelled = True
            self._cancelled.append(request)
            self._condition.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Waits until nothing is left to do or to tell; returns whether that came within `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: self._ended or not (self._working or self._has_work), timeout)

    def cancel_all(self) -> None:
        with self._condition:
            for request in self._scheduler.requests:
                self.cancel(request)

    def suspend(self) -> list[SessionSnapshot]:
        """As `cancel_all`, but keeps the conversations that decode: returns these and what was suspended before.

        Blocks until everybody has been told. Nothing may be submitted afterwards.
        """
        with self._condition:
            self._suspending = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._ended or not self._suspending)
            return self._saved

    def stop(self) -> None:
        """Ends the thread; requests still there end with an error."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def stats(self) -> EngineStats:
        with self._condition:
            slots = tuple(self._slot_stats(slot, who, self._prefill) for slot, who in enumerate(self._scheduler.slots))
            return dataclasses.replace(
                self._stats,
                slots=slots,
                waiting=len(self._scheduler.waiting),
                running=len(self._scheduler.running),
                suspended=len(self._suspended),
            )

    def check_integrity(self) -> None:
        """Raises AssertionError on contradictions. Only for an idle engine: it looks at the device."""
        with self._condition:
            self._scheduler.check_integrity()
            assert self._scheduler.idle, "requests are left"
            assert self._prefill is None, "a prefill is left"
            assert not self._pending, "results are left unread"
            stats = self._stats
            assert stats.submitted == stats.finished + stats.cancelled + stats.failed, stats
            self._runner.check_integrity()
            self._suspended.check_integrity()

    def _slot_stats(self, slot: int, held: ActiveRequest | None, prefill: Prefill | None) -> SlotStats:
        if held is None:
            tokens = self._suspended.tokens(slot)
            return SlotStats("free") if tokens is None else SlotStats("suspended", tokens=tokens)
        if slot == self._scheduler.prefilling:
            done = 0.0 if prefill is None else prefill.progress
            return SlotStats("prefill", held.request_id, round(done * len(held.prompt)), done)
        return SlotStats("decode", held.request_id, len(held.prompt) + held.generated, 1.0)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                began = time.monotonic()
                self._cancel()
                if self._suspending:
                    self._suspend()
                self._resume()
                self._admit()
                worked = self._decode() | self._advance()
                self._collect(keep=1 if worked else 0)
                self._count(busy_seconds=time.monotonic() - began)
        except BaseException as error:  # the thread's last act: nobody may wait for ever
            logger.critical("the engine's thread ended", exc_info=error)
            self.failure = error
        finally:
            with self._condition:
                everyone = self._scheduler.requests
                for request in everyone:
                    self._scheduler.remove(request)
                prefill, self._prefill = self._prefill, None
                self._pending.clear()
            if prefill is not None:
                prefill.close()
            for request in everyone:
                self._end(request, Finish.ERROR, "the engine has stopped")
            with self._condition:
                self._working = False
                self._ended = True
                self._condition.notify_all()

    def _wait_for_work(self) -> bool:
        with self._condition:
            self._working = False
            self._condition.notify_all()  # for `wait_idle`
            while not (self._stopping or self._can_work):
                self._condition.wait(min(map(self._patience, self._scheduler.waiting), default=None))
            self._working = not self._stopping
            return self._working

    @property
    def _has_work(self) -> bool:
        return bool(self._cancelled or self._pending or self._suspending) or not self._scheduler.idle

    @property
    def _can_work(self) -> bool:
        scheduler = self._scheduler
        ready = any(not self._patience(request) for request in scheduler.waiting)
        return bool(self._cancelled or self._pending or self._suspending or scheduler.running or ready)

    def _cancel(self) -> None:
        with self._condition:
            cancelled, self._cancelled = self._cancelled, []
        for request in cancelled:
            if not request.finished:
                self._leave(request)
                self._end(request, Finish.CANCELLED)

    def _suspend(self) -> None:
        self._collect(keep=0)  # so that the host knows of every token that the slots have drawn
        with self._condition:
            everyone = self._scheduler.requests
            self._suspended.cut_off(self._scheduler.decoding)
        self._saved = self._suspended.take()
        for request in everyone:
            self._leave(request)
            self._end(request, Finish.CANCELLED)
        self._suspending = False
        self._wake()

    def _resume(self) -> None:
        """Requests for a suspended conversation go on with it at once: its slot waits for nobody else."""
        with self._condition:
            claims = self._suspended.claim(self._scheduler.waiting)
            for slot, request, _ in claims:
                self._scheduler.resume(request, slot)
        for _, request, conversation in claims:
            self._hand_over(request, functools.partial(conversation.tell, request))
            self._count(prompt_tokens=len(request.prompt), cached_tokens=request.cached_tokens)

    def _leave(self, request: ActiveRequest) -> None:
        prefill = None
        with self._condition:
            slot = self._scheduler.remove(request)
            if slot is not None and self._scheduler.prefilling is None:
                prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.close()
        if slot is not None:
            self._runner.leave(slot)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _patience(self, request: ActiveRequest) -> float:
        """Seconds that a request may still wait for its stored KV, once it is its turn."""
        store = self._runner.layout.store
        if request.fetch is None or request.fetch.done or store is None:
            return 0.0
        patience = store.patience(len(request.fetch.names) * BLOCK_TOKENS)
        return max(request.fetch.started + patience - time.monotonic(), 0.0)

    def _ready(self, request: ActiveRequest) -> bool:
        # one whose conversation is suspended has come since `_resume`, and waits for its next turn
        return not self._patience(request) and self._suspended.find(request) is None

    def _admit(self) -> None:
        with self._condition:
            admitted = self._scheduler.admit(self._ready, self._suspended.slots)
            dropped = None if admitted is None else self._suspended.drop(admitted[0])
        if admitted is None:
            return
        slot, request = admitted
        if dropped is not None:
            logger.info("a suspended conversation of %d tokens makes way", dropped.position + 1)
        request.scheduled()
        fetch, request.fetch = request.fetch, None
        self._prefill = self._runner.begin(
            request.prompt,
            slot,
            request.params.compress_after,
            request.cache_salt,
            plans=request.plans,
            turn=request.params.turn,
            fetch=fetch,
            answer=request.answer,
        )
        found = fetch.found if fetch is not None and self._prefill.reused else ()
        request.found = {tier: BLOCK_TOKENS * count for tier, count in collections.Counter(found).items()}
        self._scores = []

    def _decode(self) -> bool:
        with self._condition:
            holders = self._scheduler.decoding
        if not holders:
            return False
        alive = np.zeros(self._runner.layout.max_num_seqs, np.bool_)
        alive[list(holders)] = True
        # While a prompt is read, one step a unit: more would finish early requests before the others join them.
        count = 1 if self._prefill is not None else self._runner.layout.decode_steps
        self._unit = None
        out = self._runner.decode(alive, count)
        self._pending.append(Pending(out.emitted, out.sample, holders))
        return True

    def _advance(self) -> bool:
        """Runs one unit of the prefill, or scores one chunk of the prompt; after the last the request decodes."""
        prefill = self._prefill
        if prefill is None:
            return False
        request = self._scheduler.slots[prefill.slot]
        assert request is not None
        jax.block_until_ready(prefill.hidden)  # one unit ahead and no more: a cancelled prompt ends soon
        if self._unit is not None:
            self._runner.took(*self._unit)
            self._unit = None
        if prefill.done:
            self._score(prefill, request)
        else:
            self._unit = prefill.chunk, time.monotonic()
            self._runner.advance(prefill)
            self._count(prefill_units=1)
        wanted = request.params.prompt_logprobs is not None
        if not prefill.done or (wanted and len(self._scores) < prefill.length - 1):
            return True
        if wanted:
            request.prompt_logprobs = (None, *self._scores[: prefill.length - 1])
        self._prefill = None
        prefill.close()
        self._count(prompt_tokens=len(request.prompt), cached_tokens=request.cached_tokens)
        if request.params.retained:
            request.retained = self._runner.retained(prefill.slot)
        if request.limit == 0:
            self._leave(request)
            self._end(request, Finish.LENGTH)
            return True
        drawn = self._runner.finish(prefill, request.params, request.stop_token_ids, request.seed, request.limit)
        self._pending.append(Pending(None, drawn, {0: request}))
        with self._condition:
            self._scheduler.prefilled()
        return True

    def _score(self, prefill: Prefill, request: ActiveRequest) -> None:
        """Reads the log-probabilities of the next chunk of the prompt's own tokens."""
        scored = self._runner.score(prefill, len(self._scores) // prefill.size)
        self._scores += token_logprobs(jax.device_get(scored), request.params.prompt_logprobs or 0)

    def _collect(self, keep: int) -> None:
        """Reads finished dispatches, all but the last `keep`, and hands their tokens out."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            emitted, sample = pending.read()
            if pending.emitted is not None:
                self._count(decode_steps=int(emitted.any(axis=1).sum()))
            for column, request in pending.holders.items():
                if not request.finished:
                    self._hand_out(request, column, emitted, sample)

    def _hand_out(self, request: ActiveRequest, column: int, emitted: np.ndarray, sample: TokenSample) -> None:
        rows = jax.tree.map(lambda x: x[emitted[:, column], column], sample)
        tokens = rows.token.tolist()
        if not tokens:
            return
        wanted = request.params.logprobs
        before = request.generated
        if self._hand_over(
            request, lambda: request.accept(tokens, () if wanted is None else token_logprobs(rows, wanted))
        ):
            self._count(generated_tokens=request.generated - before)

    def _hand_over(self, request: ActiveRequest, accept: Callable[[], None]) -> bool:
        """Has a request take tokens; it leaves if it is done or cannot. Returns whether it could."""
        try:
            accept()
        except CallerGoneError:
            self._leave(request)
            self._end(request, Finish.CANCELLED)
            return False
        except Exception:
            logger.exception("request %s failed", request.request_id)
            self._leave(request)
            self._end(request, Finish.ERROR, "the request failed while its text was being written")
            return False
        if request.finished:
            self._leave(request)
            self._count(finished=1)
        return True

    def _end(self, request: ActiveRequest, finish: Finish, error: str | None = None) -> None:
        if request.fetch is not None:  # it has never begun
            request.fetch.close()
        try:
            request.end(finish, error)
        except Exception:  # its caller has gone
            logger.debug("request %s ended unheard", request.request_id, exc_info=True)
        counter = {Finish.CANCELLED: "cancelled", Finish.ERROR: "failed"}.get(finish, "finished")
        self._count(**{counter: 1})

    def _count(self, **more: int | float) -> None:
        with self._condition:
            stats = self._stats
            self._stats = dataclasses.replace(stats, **{name: getattr(stats, name) + more[name] for name in more})
