"""Service: the state that the routes share, and the checks of a request against the engine."""

import dataclasses
import logging
from collections.abc import Mapping

from starlette.requests import Request

from kvjax.engine.request import (
    Constraint,
    ConstraintError,
    ContextLengthExceededError,
    EngineDeadError,
    QueueFullError,
)
from kvjax.serve.errors import ApiError, from_engine, unavailable
from kvjax.serve.limits import Limits
from kvjax.serve.metrics import Metrics
from kvjax.serve.monitor import Monitor
from kvjax.serve.protocol import EngineProtocol, ReservationProtocol
from kvjax.serve.schema import GenerationRequest
from kvjax.serve.security import Keyring
from kvjax.serve.tokenising import Tokenising

logger = logging.getLogger("kvjax.serve")


@dataclasses.dataclass(frozen=True)
class Service:
    """Made once a server.

    Attributes:
        names: model names that requests may use; the first is the one shown.
        max_queued: how many requests may wait for a slot.
        tokenising: the engine's tokenizer, in threads of its own.
        defaults: of request fields, as the model's publisher recommends them.
        warned: unknown field names that were already warned about.
    """

    engine: EngineProtocol
    names: tuple[str, ...]
    keyring: Keyring
    limits: Limits
    max_queued: int
    metrics: Metrics
    monitor: Monitor
    tokenising: Tokenising
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warned: set[str] = dataclasses.field(default_factory=set)

    @property
    def shown_names(self) -> list[str]:
        """The names without those that are paths of this machine, which requests may use all the same."""
        return [name for name in self.names if not name.startswith(("/", "~", "."))] or ["model"]

    def require_ready(self) -> None:
        """Raises ApiError (503) unless the engine takes requests."""
        phase = self.engine.phase
        if phase in ("loading", "compiling"):
            raise unavailable(f"the model is {phase}; GET /health turns 200 when it is ready", "not_ready")
        if phase != "ready":
            code = "draining" if phase == "draining" else "engine_dead"
            raise unavailable(f"the server is shutting down (the engine is {phase})", code)

    def model(self, name: str | None) -> str:
        """The name to answer with; raises ApiError (404) for one that is not served."""
        if name is None:
            return self.shown_names[0]
        if name not in self.names:
            served = ", ".join(repr(each) for each in self.shown_names)
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; this server has {served}",
                param="model",
                code="model_not_found",
            )
        return name

    def admit(self, count: int) -> ReservationProtocol:
        """Places for `count` streams, to be entered. Raises ApiError: 503 if full, 400 if it never fits."""
        slots = len(self.engine.stats().slots)
        if slots and count > slots + self.max_queued:
            raise ApiError(
                400,
                f"the request asks for {count} completions; this server holds {slots + self.max_queued} "
                f"({slots} slots and {self.max_queued} waiting). Send it in parts",
                param="prompt",
                code="too_many_completions",
            )
        try:
            return self.engine.reserve(count)
        except (QueueFullError, EngineDeadError) as error:
            self.require_ready()  # draining is not overload
            raise from_engine(error) from error

    def check_context(self, prompt: int, max_tokens: int | None, *, param: str) -> None:
        """Raises ApiError (400) unless the prompt and what it asks for fit. Nothing is ever clipped."""
        requested = 1 if max_tokens is None else max_tokens
        if prompt + requested > self.engine.max_model_len:
            raise from_engine(ContextLengthExceededError(prompt, requested, self.engine.max_model_len), param=param)

    def check_selection(self, prompt: int, compress_after: int | None) -> None:
        """Raises ApiError (400) for a `compress_after` that lies behind the prompt's `prompt` tokens."""
        if compress_after is not None and compress_after > prompt:
            raise ApiError(
                400,
                f"compress_after={compress_after} is more than the {prompt} tokens of the prompt: give 1 to {prompt}, "
                "or leave it out to choose after all of them",
                param="compress_after",
            )

    def check_budget(self, token_budget: int | None) -> None:
        """Raises ApiError (400) for a `token_budget` that the engine's views cannot be cut to."""
        try:
            self.engine.caches.within(token_budget)
        except ValueError as error:
            raise ApiError(400, str(error), param="token_budget") from error

    def check_tokens(self, ids: list[int], *, param: str) -> None:
        """Raises ApiError (400) for a token id outside the vocabulary."""
        size = self.engine.vocab_size
        if ids and max(ids) >= size:
            raise ApiError(400, f"{param}: token id {max(ids)} is outside [0, {size - 1}]", param=param)

    def check_tokens_of(self, body: GenerationRequest) -> None:
        """Raises ApiError (400) for a token outside the vocabulary in any field that holds some."""
        self.check_tokens([int(token) for token in body.logit_bias or ()], param="logit_bias")
        self.check_tokens(body.stop_token_ids or [], param="stop_token_ids")
        self.check_tokens(body.allowed_token_ids or [], param="allowed_token_ids")

    async def check_constraint(self, constraint: Constraint | None) -> None:
        """Compiles a grammar, in a thread. Raises ApiError (400) for what is none."""
        if constraint is not None:
            compiling = self.tokenising.run(len(constraint.source), lambda _: self.engine.check_constraint(constraint))
            try:
                await compiling
            except ConstraintError as error:
                raise ApiError(400, str(error), param="response_format", code="invalid_grammar") from error

    def salt(self, request: Request, requested: str | None) -> str:
        return self.keyring.salt(request.state.key, requested or "")

    def warn_unknown(self, names: list[str]) -> None:
        """One warning for each unknown field name, ever: clients send the same ones with every request."""
        for name in names:
            if name not in self.warned and len(self.warned) < self.limits.unknown_names:
                self.warned.add(name)
                logger.warning("ignoring a request field this server does not know: %.60r", name)
