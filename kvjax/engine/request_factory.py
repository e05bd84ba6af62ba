"""Request factory: active requests out of prompts and sampling parameters, checked against the engine's limits."""

import random
from collections.abc import Sequence

import numpy as np

from kvjax.engine.active_request import ActiveRequest, DeltaCallback
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.request import Constraint, ContextLengthExceededError, SamplingParams
from kvjax.engine.text.constraints import ConstraintCompiler
from kvjax.engine.text.tokenizer import Tokenizer


class RequestFactory:
    """Makes the requests of one engine; safe to use from several threads.

    Args:
        seed: where the seeds of requests without one start.
    """

    def __init__(self, caches: CacheConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._caches, self._tokenizer, self._seeds = caches, tokenizer, random.Random(seed)
        self._constraints = ConstraintCompiler(tokenizer, caches.model.vocab_size, caches.model.eos_token_ids)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises what `make` would raise."""
        generation_limit(self._caches, prompt, params)

    def check_constraint(self, constraint: Constraint) -> None:
        """Compiles a grammar. Raises ConstraintError, as `ConstraintCompiler.check`."""
        self._constraints.check(constraint)

    def make(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        on_delta: DeltaCallback,
        request_id: str = "",
        cache_salt: str = "",
    ) -> ActiveRequest:
        """A request that nothing has been computed for.

        Raises:
            ContextLengthExceededError, ValueError: as `generation_limit`; a constraint that leaves no token too.
        """
        limit, limited_by = generation_limit(self._caches, prompt, params)
        eos = () if params.ignore_eos else self._caches.model.eos_token_ids
        caches = self._caches.within(params.token_budget)
        stop_token_ids = (*eos, *params.stop_token_ids)
        return ActiveRequest(
            request_id,
            np.asarray(prompt, np.int32),
            params,
            self._tokenizer,
            on_delta,
            stop_token_ids=stop_token_ids,
            limit=limit,
            limited_by=limited_by,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            cache_salt=cache_salt,
            plans=caches.plans,
            decoding=caches.decoding,
            constraint=self._constraints.of(params, stop_token_ids),
            view_fraction=caches.retained_bytes(len(prompt)) / caches.full_bytes(len(prompt)),
        )


def generation_limit(caches: CacheConfig, prompt: Sequence[int], params: SamplingParams) -> tuple[int, str | None]:
    """The most tokens that a valid request may generate, and why these are fewer than it requests (None if not).

    Raises:
        ContextLengthExceededError: prompt and `max_tokens` exceed the context.
        ValueError: the prompt is empty, a token is none of the model's, or the token budget is not served.
    """
    layout, vocab_size = caches.layout, caches.model.vocab_size
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if not (min(prompt) >= 0 and max(prompt) < vocab_size):
        raise ValueError(f"token ids must be in [0, {vocab_size}); the prompt has {min(prompt)} to {max(prompt)}")
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
        outside = [token for token in getattr(params, name) if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"{name}: token {outside[0]} is outside [0, {vocab_size})")
    headroom = layout.max_model_len - len(prompt)
    requested = max(headroom, 1) if params.max_tokens is None else params.max_tokens
    if requested > headroom:
        raise ContextLengthExceededError(len(prompt), requested, layout.max_model_len)
    selected = min(params.compress_after or len(prompt), len(prompt))
    caches = caches.within(params.token_budget)
    view = None if layout.reselect else caches.headroom(selected)
    if view is None:
        return requested, None
    left = view - (len(prompt) - selected)
    if left < 0:
        raise ValueError(
            f"the prompt behind compress_after={selected} is {-left} tokens longer than the views' headroom of {view}: "
            f"select later, or start the engine with --headroom {len(prompt) - selected} or without --when-full stop"
        )
    if requested <= left + 1:  # the last token never enters a view
        return requested, None
    reason = f"the views' headroom of {view} tokens is used up: raise --headroom, or drop --when-full stop"
    return left + 1, reason
