"""Server-sent events, and work that ends when its client leaves.

    client ── receive ──► watcher ─┐ cancels
    engine ── deltas ───► work ────┴─► EventChannel ── send ──► client
                          beat ──────► (a comment when nothing was said for a while)

One task watches the connection, one works, one beats; all three end with the response.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvjax.serve.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class ClientDisconnectedError(Exception):
    """The client closed its connection before the answer was complete."""


async def unless_disconnected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves, `work` is cancelled: ClientDisconnectedError."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def encode(event: object) -> bytes:
    """One event. Only ASCII: some clients split lines at U+2028 or U+0085, which JSON leaves as they are."""
    return b"data: " + json.dumps(event, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


class EventChannel:
    """The sending half of a stream. Headers leave with the first bytes: an early failure has its status."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self._send, self._headers = send, headers
        self._lock = asyncio.Lock()  # the beat and several choices write to one connection
        self._last = time.monotonic()

    async def event(self, event: object) -> None:
        await self.write(encode(event))

    async def write(self, data: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            self._last = time.monotonic()
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def beat(self, interval: int | float) -> None:
        """Writes a comment whenever `interval` seconds passed in silence; runs until cancelled."""
        while True:
            silent = time.monotonic() - self._last
            if silent >= interval:
                await self.write(KEEP_ALIVE)
                silent = 0.0
            await asyncio.sleep(interval - silent)


class EventStream(Response):
    """A stream of events that `produce` writes; `resources` are released when it ends, however it ends.

    A failure before the first byte is raised and becomes an ordinary error answer; after it, an error event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        produce: Callable[[EventChannel], Awaitable[None]],
        *,
        keep_alive: int | float,
        resources: contextlib.ExitStack,
    ) -> None:
        # proxies such as nginx would otherwise gather the events
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._produce, self._keep_alive, self._resources = produce, keep_alive, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._resources:
            channel = EventChannel(send, self.raw_headers)
            await unless_disconnected(receive, self._run(channel, scope))

    async def _run(self, channel: EventChannel, scope: Scope) -> None:
        beat = asyncio.create_task(channel.beat(self._keep_alive))
        try:
            await self._produce(channel)
        except Exception as error:
            if not channel.started:
                raise
            if not isinstance(error, ApiError):
                logger.exception("stream %s failed", scope["state"]["request_id"])
                error = internal_error(scope["state"]["request_id"])
            scope["state"]["note"] = f"{error.kind} {error.code or ''}".rstrip()
            await channel.event(error.body())
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        await channel.write(DONE, more=False)
