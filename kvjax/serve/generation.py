"""From a checked request to its answer: one engine stream for each choice, side by side, whole or as events.

Generation ── stream ──► EngineProtocol          one task a choice
    └── (choice, delta) ──► Reply        what the endpoint makes of it: completions or chat
"""

import abc
import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvjax.engine.request import Delta, Finish, SamplingParams
from kvjax.serve.errors import ApiError, from_engine, unavailable
from kvjax.serve.protocol import ReservationProtocol
from kvjax.serve.retained import summarise
from kvjax.serve.service import Service
from kvjax.serve.sse import EventChannel, EventStream, unless_disconnected
from kvjax.serve.tally import StreamTally, summary, total_usage


@dataclasses.dataclass(frozen=True)
class Choice:
    """One stream to run: `index` is that of the answer's `choices`."""

    index: int
    prompt: list[int]
    params: SamplingParams
    tally: StreamTally


class Reply(abc.ABC):
    """What an endpoint makes of deltas. Made for one request and never shared; no method waits."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.model, self.created = name, model, int(time.time())

    @abc.abstractmethod
    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """The choice object of one event, or None if the delta shows nothing yet."""

    @abc.abstractmethod
    def add(self, choice: Choice, delta: Delta) -> None:
        """Keeps the delta for `whole`."""

    @abc.abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """The choice object of the complete answer."""

    @abc.abstractmethod
    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        """The answer without its choices."""


class Generation:
    """The streams of one request. The first that fails cancels the others: one request, one outcome."""

    def __init__(
        self,
        service: Service,
        choices: list[Choice],
        *,
        reservation: ReservationProtocol,
        cache_salt: str,
        name: str,
    ) -> None:
        self.service, self.choices, self.name = service, choices, name
        self._reservation, self._salt = reservation, cache_salt

    @property
    def tallies(self) -> list[StreamTally]:
        return [choice.tally for choice in self.choices]

    async def run(self, on_delta: Callable[[Choice, Delta], Awaitable[None]]) -> None:
        """Runs all streams to their end. Raises ApiError; cancelling it cancels them all."""
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self.choices:
                    group.create_task(self._follow(choice, on_delta))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _follow(self, choice: Choice, on_delta: Callable[[Choice, Delta], Awaitable[None]]) -> None:
        metrics, before = self.service.metrics, 0.0
        name = self.name if len(self.choices) == 1 else f"{self.name}-{choice.index}"
        stream = self.service.engine.stream(
            choice.prompt,
            choice.params,
            reservation=self._reservation,
            cache_salt=self._salt,
            request_id=name,
        )
        reason = "abort"
        try:
            async with contextlib.aclosing(stream) as deltas:
                async for delta in deltas:
                    now = time.monotonic()
                    if before and delta.tokens:
                        metrics.tokens(now - before, len(delta.tokens))
                    before = now if delta.tokens else before
                    choice.tally.add(delta)
                    if delta.retained is not None:  # millions of numbers for a long prompt
                        choice.tally.retained = await asyncio.to_thread(summarise, delta.retained, len(choice.prompt))
                    if delta.finish in (Finish.ERROR, Finish.CANCELLED):
                        reason = Finish.ERROR if delta.finish is Finish.ERROR else "abort"
                        raise _stopped(delta)
                    await on_delta(choice, delta)
            if choice.tally.finish is None:
                reason = Finish.ERROR
                raise unavailable("the engine ended the request without an answer", "engine_dead")
            reason = choice.tally.finish
        except Exception as error:
            if not isinstance(error, ApiError):
                reason = Finish.ERROR
            raise from_engine(error) from error
        finally:
            tally = choice.tally
            metrics.ended(reason, prompt_tokens=tally.prompt_tokens, generated=tally.generated, timing=tally.timing)
            if tally.timing and tally.generated:
                self.service.monitor.first_token(tally.timing.first_token - tally.timing.arrived)


async def answer(
    request: Request,
    generation: Generation,
    reply: Reply,
    resources: contextlib.ExitStack,
    *,
    stream: bool,
    include_usage: bool = False,
    continuous_usage: bool = False,
) -> Response:
    """The HTTP answer. A stream takes `resources` over and releases them at its end."""
    request.state.name = generation.name

    async def finish(on_delta: Callable[[Choice, Delta], Awaitable[None]]) -> None:
        try:
            await generation.run(on_delta)
        finally:
            request.state.note = summary(generation.tallies)

    async def produce(channel: EventChannel) -> None:
        head = reply.envelope(streamed=True)

        async def on_delta(choice: Choice, delta: Delta) -> None:
            chunk = reply.chunk(choice, delta)
            if chunk is None:
                return
            used = {"usage": choice.tally.usage() if continuous_usage else None} if include_usage else {}
            await channel.event(head | {"choices": [chunk]} | used)

        await finish(on_delta)
        if include_usage:
            await channel.event(head | {"choices": [], "usage": total_usage(generation.tallies)})

    if stream:
        keep_alive = generation.service.limits.keep_alive_seconds
        return EventStream(produce, keep_alive=keep_alive, resources=resources.pop_all())

    async def keep(choice: Choice, delta: Delta) -> None:
        reply.add(choice, delta)

    await unless_disconnected(request.receive, finish(keep))
    choices = [reply.whole(choice) for choice in generation.choices]
    usage = total_usage(generation.tallies)
    return JSONResponse(reply.envelope(streamed=False) | {"choices": choices, "usage": usage})


def _stopped(delta: Delta) -> ApiError:
    """Why the engine ended a stream that nobody cancelled."""
    if delta.finish is Finish.CANCELLED:
        return unavailable(delta.error or "the server is shutting down and cancelled the request", "draining")
    return ApiError(500, delta.error or "the engine could not finish the request", code="generation_failed")
