"""GET routes: models, health, metrics, the state and the page that shows it."""

import importlib.resources
import time

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, Response

import kvjax
from kvjax.serve.errors import GET_ERRORS, ApiError, documented, unavailable
from kvjax.serve.replies import NOT_READY, Alive, Health, ModelCard, ModelList, State, Version
from kvjax.serve.service import Service

# The page is one file with its script and style inside, and talks to this server only.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def read_page() -> str | None:
    """The page that ships with the package, or None."""
    file = importlib.resources.files("kvjax.serve") / "page.html"
    return file.read_text("utf-8") if file.is_file() else None


def probe_routes(service: Service, page: str | None) -> APIRouter:
    router = APIRouter(responses=GET_ERRORS)
    created = int(time.time())

    def card(name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "kvjax",
            "root": service.shown_names[0],
            "max_model_len": service.engine.max_model_len,
        }

    @router.get("/v1/models", response_model=ModelList, responses=documented(503), tags=["models"])
    async def list_models() -> JSONResponse:
        """The names requests may use; all are the same model."""
        service.require_ready()
        return JSONResponse({"object": "list", "data": [card(name) for name in service.shown_names]})

    @router.get("/v1/models/{model:path}", response_model=ModelCard, responses=documented(404, 503), tags=["models"])
    async def retrieve_model(model: str) -> JSONResponse:
        """One model's card."""
        service.require_ready()
        return JSONResponse(card(service.model(model)))

    @router.get("/health", response_model=Health, responses=NOT_READY, tags=["probes"])
    async def health() -> JSONResponse:
        """200 when requests are taken; before and after that 503 with the phase."""
        phase = service.engine.phase
        if phase == "ready":
            return JSONResponse({"status": "ok", "phase": phase})
        error = unavailable(f"not ready: {phase}", "not_ready")
        return JSONResponse(error.body() | {"phase": phase}, error.status_code, error.headers)

    @router.get("/live", response_model=Alive, tags=["probes"])
    async def live() -> JSONResponse:
        """200 while the process answers at all."""
        return JSONResponse({"status": "alive"})

    @router.get("/version", response_model=Version, tags=["probes"])
    async def version() -> JSONResponse:
        """This server's version."""
        return JSONResponse({"version": kvjax.__version__})

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["probes"],
    )
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/state", response_model=State, tags=["probes"])
    async def state() -> JSONResponse:
        """The last two minutes, for the page."""
        return JSONResponse(service.monitor.state(), headers={"Cache-Control": "no-store"})

    @router.get(
        "/",
        response_class=Response,
        responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}, **documented(404)},
        tags=["probes"],
    )
    async def index() -> HTMLResponse:
        """A page that shows what the server is doing."""
        if page is None:
            raise ApiError(404, "this build has no page; GET /openapi.json lists the API", code="not_found")
        headers = {"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers=headers)

    return router
