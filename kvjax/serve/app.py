"""The ASGI application around one engine.

RequestGate (id, log, last resort) ─► HostGuard (name) ─► Guard (key) ─► BodyLimit ─► routes ─► engine
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import kvjax
from kvjax.serve.body import BodyLimit
from kvjax.serve.chat import chat_routes
from kvjax.serve.completions import completion_routes
from kvjax.serve.errors import on_http_exception, on_validation_error
from kvjax.serve.fields import MODEL_FORMAT, TOKEN_ID_FORMAT
from kvjax.serve.gate import RequestGate
from kvjax.serve.hosts import AllowedHosts, HostGuard
from kvjax.serve.limits import Limits
from kvjax.serve.metrics import Metrics
from kvjax.serve.monitor import Monitor
from kvjax.serve.probes import probe_routes
from kvjax.serve.protocol import EngineProtocol
from kvjax.serve.replies import chunk_schemas
from kvjax.serve.security import OPEN_PATHS, Guard, Keyring
from kvjax.serve.service import Service
from kvjax.serve.tokenising import Tokenising
from kvjax.serve.tokens import token_routes


def create_app(
    engine: EngineProtocol,
    *,
    names: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    allowed_hosts: AllowedHosts | None = None,
    defaults: Mapping[str, float] | None = None,
    max_queued: int = 256,
    limits: Limits | None = None,
    page: str | None = None,
) -> FastAPI:
    """The application; the engine may still be loading.

    `names` are what requests may call the model, its own name if empty. Without `api_keys` none is needed.
    `defaults` are of request fields, as `temperature`.
    `allowed_hosts` are those that requests may name as their host: without it any with keys, else loopback ones.
    """
    served = tuple(dict.fromkeys(names)) or (engine.model_name,)
    limits = limits or Limits()
    metrics = Metrics(engine, served[0])
    service = Service(
        engine=engine,
        names=served,
        keyring=Keyring.of(api_keys),
        limits=limits,
        max_queued=max_queued,
        metrics=metrics,
        monitor=Monitor(engine, served[0], metrics),
        tokenising=Tokenising(engine, limits.waiting_texts),
        defaults=dict(defaults or {}),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(service.monitor.run())
        yield
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)

    app = FastAPI(
        title="kvjax",
        version=kvjax.__version__,
        description="An OpenAI-compatible server. Unknown fields of a request are accepted and ignored.",
        docs_url=None,  # both pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would be made of the Host header
    )
    app.include_router(completion_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(token_routes(service))
    app.include_router(probe_routes(service, page))
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    # the last one added is the outermost
    app.add_middleware(BodyLimit, limit=limits.body_bytes)
    app.add_middleware(Guard, keyring=service.keyring)
    app.add_middleware(HostGuard, allowed=allowed_hosts or AllowedHosts.resolve((), keys=bool(api_keys)))
    app.add_middleware(RequestGate, metrics=service.metrics)
    document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(document(), service)
        return app.openapi_schema

    app.openapi = openapi
    return app


def complete(document: dict[str, Any], service: Service) -> dict[str, Any]:
    """Completes FastAPI's document with what depends on this server, and corrects what differs here.

    A validation error is 400 here, most paths want a key if one is set, and there are models that only events hold.
    """
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name, schema in chunk_schemas().items():
        schemas.setdefault(name, schema)
    known = {TOKEN_ID_FORMAT: {"maximum": service.engine.vocab_size - 1}, MODEL_FORMAT: {"enum": service.shown_names}}
    _fill_in(schemas, known)
    locked = bool(service.keyring.digests)
    if locked:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in OPEN_PATHS:
                operation["responses"].pop("401", None)
            elif locked:
                operation["security"] = [{"key": []}]
    return document


def _fill_in(node: Any, known: dict[str, dict[str, Any]]) -> None:
    """Replaces the marks that `schema` leaves by what is known of the model."""
    if isinstance(node, dict):
        if node.get("format") in known:
            node.update(known[node.pop("format")])
        for each in node.values():
            _fill_in(each, known)
    elif isinstance(node, list):
        for each in node:
            _fill_in(each, known)
