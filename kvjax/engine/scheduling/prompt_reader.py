"""Prompt reader: one prompt on its way through the runner, with its KV to and from the store, a unit at a time."""

import time

import jax

from kvjax.engine.active_request import ActiveRequest
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.sampling import SamplerState, TokenSample, token_logprobs
from kvjax.engine.kv.transfers import KVTransfers
from kvjax.engine.request import TokenLogprob
from kvjax.engine.scheduling.counters import EngineCounters


class PromptReader:
    """The prompt of one request. The engine's thread owns it, and closes it however the request ends."""

    def __init__(
        self, runner: Runner, transfers: KVTransfers, counters: EngineCounters, request: ActiveRequest, slot: int
    ) -> None:
        """Begins the prefill in `slot`, with as much stored KV as is there by now."""
        params = request.params
        self._runner, self._transfers, self._counters, self._request = runner, transfers, counters, request
        self._prefill = runner.begin(request.prompt, slot, params.compress_after, plans=request.plans, turn=params.turn)
        self._transfer = transfers.begin(self._prefill, request.prefix, request.cache_salt, request.for_store)
        request.prefix = None
        request.cached = dict(self._transfer.cached_tokens)
        self._scores: list[TokenLogprob] = []
        self._timed: tuple[int, int, float] | None = None  # start and size of a unit alone on the device, and its begin

    @property
    def slot(self) -> int:
        return self._prefill.slot

    @property
    def progress(self) -> float:
        """The share of its units that is done."""
        return self._prefill.progress

    def interrupted(self) -> None:
        """Something else runs on the device besides the last unit, which is therefore not timed."""
        self._timed = None

    def advance(self) -> bool:
        """Runs one unit of the prefill, or scores one chunk of the prompt; returns whether that was the last.

        Waits for the unit before: one is ahead and no more, so that a cancelled prompt ends soon.
        """
        prefill = self._prefill
        jax.block_until_ready(prefill.hidden)
        if self._timed is not None:
            start, size, began = self._timed
            self._transfers.measured(start, size, time.monotonic() - began)
            self._timed = None
        if prefill.done:
            self._score()
        else:
            self._timed = (*prefill.units[prefill.unit], time.monotonic()) if prefill.in_groups else None
            self._transfer.before_unit()
            self._runner.advance(prefill)
            self._transfer.after_unit()
            self._counters.prefill_units += 1
        return prefill.done and not self._unscored

    def finish(self) -> None:
        """Gives the request what is known of its prompt, once all units have run."""
        request = self._request
        if request.params.prompt_logprobs is not None:
            request.prompt_logprobs = (None, *self._scores[: self._prefill.length - 1])
        self.close()
        self._counters.prompt_tokens += len(request.prompt)
        self._counters.cached_tokens += request.cached_tokens
        if request.params.retained:
            request.retained = self._runner.retained(self.slot)

    def first_token(self) -> TokenSample:
        """Draws the first token [1] behind the prompt, and sets the slot decoding."""
        request, runner = self._request, self._runner
        sampler = SamplerState.of(
            request.params,
            request.prompt,
            request.stop_token_ids,
            request.seed,
            runner.vocab_size,
            None if request.constraint is None else request.constraint.mask(),
        )
        return runner.finish(self._prefill, sampler, request.limit)

    def close(self) -> None:
        """Lets go of all that the store holds for the prompt. May be called twice, and before the last unit."""
        self._transfer.close()

    @property
    def _unscored(self) -> bool:
        asks = self._request.params.prompt_logprobs is not None
        return asks and len(self._scores) < self._prefill.length - 1

    def _score(self) -> None:
        """Reads the log-probabilities of the next chunk of the prompt's own tokens."""
        scored = self._runner.score(self._prefill, len(self._scores) // self._prefill.sizes[-1])
        self._scores += token_logprobs(jax.device_get(scored), self._request.params.prompt_logprobs or 0)
