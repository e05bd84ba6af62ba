"""Errors as OpenAI shapes them: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong.

A message names the value, the bound and the way out. Clients retry every 5xx, so bad input is always a 4xx.
"""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from kvjax.engine.request import ContextLengthExceededError, EngineDeadError, QueueFullError

RETRY_AFTER_SECONDS = 2


class ErrorDetail(BaseModel):
    """What went wrong: `code` for programs, `message` for people. A context overflow adds three counts."""

    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer with `status`, raised from anywhere below the routes. `extra` joins the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.message, self.param, self.code, self.extra = message, param, code, dict(extra or {})

    def body(self) -> dict[str, Any]:
        detail = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": detail | self.extra}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def unavailable(message: str, code: str, *, retry_after: int = RETRY_AFTER_SECONDS) -> ApiError:
    """503: nothing is wrong with the request, try again after `retry_after` seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def from_engine(error: Exception, *, param: str | None = None) -> ApiError:
    """The answer to an exception of the engine's or its types'; one that is none of these is raised again."""
    match error:
        case ApiError():
            return error
        case ContextLengthExceededError():
            counts = ("prompt_tokens", "max_tokens", "max_model_len")
            extra = {name: getattr(error, name) for name in counts}
            return ApiError(400, str(error), param=param, code="context_length_exceeded", extra=extra)
        case QueueFullError():
            message = str(error) or "every slot and every place in the queue is taken"
            return unavailable(f"{message}. Retry after {RETRY_AFTER_SECONDS} s", "overloaded")
        case EngineDeadError():
            return unavailable("the engine has stopped; the server is about to exit", "engine_dead")
        case ValueError():
            return ApiError(400, str(error), param=param or field_named(str(error)))
        case _:
            raise error


def field_named(message: str) -> str | None:
    """The field in a message of the engine's, which writes what is wrong as `field=value`."""
    match = re.search(r"\b([a-z][a-z_]*)=", message)
    return match and match[1]


def internal_error(request_id: str) -> ApiError:
    """500, without a word about the cause: that goes to the log under `request_id`."""
    return ApiError(
        500, f"internal error; the server's log has it under request id {request_id}", code="internal_error"
    )


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors (404, 405) and those of the routes, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        path, method = request.url.path, request.method
        messages = {
            404: f"there is no {method} {path[:200]}; GET /openapi.json lists what there is",
            405: f"{path[:200]} does not answer {method}",
        }
        code = HTTPStatus(error.status_code).name.lower()
        message = messages.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, code=code, headers=error.headers)
    request.state.note = f"{error.kind} {error.code or ''}".rstrip()
    return error.response()


async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """A body that does not fit its model: 400 with the path of the field that is wrong."""
    assert isinstance(error, RequestValidationError)
    param, message = explain(error.errors(), error.body)
    return await on_http_exception(request, ApiError(400, message, param=param))


def explain(problems: Sequence[Any], body: object) -> tuple[str | None, str]:
    """The field and the sentence of the most telling of a validator's errors.

    Where a field may have several types there is one error for each that was tried. The one that got deepest
    is that of the type the user meant, and a bound says more than a type.
    """
    best: tuple[tuple[int, bool], str | None, str] | None = None
    for problem in problems:
        if problem["type"] == "together":
            within, _ = field_path(problem["loc"], body, missing=False)
            return ".".join(filter(None, (within, problem["ctx"]["field"]))), problem["msg"]
        path, depth = field_path(problem["loc"], body, missing=problem["type"] == "missing")
        rank = (depth, not problem["type"].endswith("_type"))
        if best is None or rank > best[0]:
            best = (rank, path, f"{path or 'the body'}: {problem['msg']}")
    assert best is not None
    return best[1], best[2]


def field_path(location: Sequence[str | int], body: object, *, missing: bool) -> tuple[str | None, int]:
    """`messages[0].content` of a validator's location, without the types it tried, and its depth."""
    path, here, depth = "", body, 0
    for step in location[1:]:
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            path, here, depth = f"{path}[{step}]", here[step], depth + 1
        elif isinstance(here, dict) and (step in here or (missing and step == location[-1])):
            path, here, depth = f"{path}.{step}" if path else str(step), here.get(step), depth + 1
    return path[:200] or None, depth


_MEANINGS = {
    400: "The request is wrong; `error.param` names the field",
    401: "No API key, or one that is not known",
    404: "No such model or path",
    413: "The body is larger than the server reads",
    415: "The body is not `application/json`",
    500: "The server failed; its log has the request id",
    503: "Not ready, overloaded or draining: retry after `Retry-After` seconds",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error answers of a route, for its entry in the OpenAPI document."""
    return {status: {"model": ErrorReply, "description": _MEANINGS[status]} for status in statuses}


POST_ERRORS = documented(400, 401, 404, 413, 415, 500, 503)
GET_ERRORS = documented(401, 500)
