"""Request bodies: limited in length, and JSON that is declared as such."""

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvjax.serve.errors import ApiError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BodyLimit:
    """ASGI middleware: 413 for a body over `limit` bytes, announced or not; never holds more than that."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.limit:
            return await self._too_large().response()(scope, receive, send)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, limited, send)

    def _too_large(self) -> ApiError:
        # the rest of the body is not read, so the connection cannot be used again
        message = f"the body is larger than {self.limit:,} bytes, the most this server reads"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


class JsonRequest(Request):
    """A request whose `json` is strict."""

    async def json(self) -> Any:
        return strict_loads(await self.body())


class JsonRoute(APIRoute):
    """A route whose body must be `application/json`: a form or plain text could be posted by any web page."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            kind = request.headers.get("content-type", "")
            if self.body_field is not None and kind.partition(";")[0].strip().lower() != "application/json":
                shown = f"{kind[:100]!r}" if kind else "missing"
                message = f"the Content-Type is {shown}; send the body as application/json"
                raise ApiError(415, message, code="unsupported_media_type")
            return await handle(JsonRequest(request.scope, request.receive))

        return checked


def strict_loads(data: bytes) -> Any:
    """JSON in UTF-8, without NaN, infinities or half surrogate pairs, which no tokenizer can encode.

    Raises ApiError (400) with the reason.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise _invalid("a string holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:
        raise _invalid(str(error).partition(";")[0]) from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    return value


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value
