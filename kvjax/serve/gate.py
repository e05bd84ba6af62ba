"""The outermost middleware: every request gets an id, one log line and an answer, even when a route fails."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvjax.serve.errors import internal_error
from kvjax.serve.metrics import Metrics
from kvjax.serve.sse import ClientDisconnectedError

logger = logging.getLogger("kvjax.serve")

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
PROBES = frozenset({"/", "/health", "/live", "/metrics", "/state"})
CLIENT_LEFT = 499  # nginx's status for it; it is in the log and the metrics alone


class RequestGate:
    """ASGI middleware. What a route puts in `request.state` ends up in the log line:

    `name` (the completion's id; else the request's) and `note` (a summary, without anything a user wrote).
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get("x-request-id", "")
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = sent if _SAFE_ID.fullmatch(sent) else uuid.uuid4().hex
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                message = {**message, "headers": headers.raw}
            await send(message)

        # every GET answers HEAD too; the server leaves the body of its answer away
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self.app(inner, receive, labelled)
        except ClientDisconnectedError:
            status = CLIENT_LEFT
        except Exception:
            logger.exception("request %s failed", request_id)
            if not status:
                state["note"] = "server_error internal_error"
                await internal_error(request_id).response()(scope, receive, labelled)
        finally:
            scope["route"] = inner.get("route")
            self._record(scope, status or CLIENT_LEFT)

    def _record(self, scope: Scope, status: int) -> None:
        state, method = scope["state"], scope["method"]
        # the route's template, not the path: a path is the user's text and has no bounds
        path = getattr(scope.get("route"), "path", "unknown")
        known = method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE") else "other"
        self.metrics.requests.labels(path=path, method=known, status=str(status)).inc()
        # a probe asks every second, and a server that loads refuses every time
        quiet = known == "GET" and (status < 400 or path in PROBES)
        name, note = state.get("name", state["request_id"]), state.get("note", f"{known} {path}")
        logger.log(logging.DEBUG if quiet else logging.INFO, "%s %d | %s", name, status, note)
