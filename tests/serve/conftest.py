"""A real uvicorn on a free port, in a thread, with a fake engine behind it."""

import contextlib
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # the tests here share one fake engine

from fake_engine import FakeEngine

from kvjax.serve.app import create_app
from kvjax.serve.lifecycle import app_config

PAGE = "<!doctype html><title>page</title>"


class LiveServer:
    """The address, the engine and the application of a running server."""

    def __init__(self, engine: FakeEngine, app: FastAPI) -> None:
        self.engine, self.app = engine, app
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = app_config(app)
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        wait_until(lambda: self._server.started)

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.engine.check_integrity()


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def serve():
    """Starts a server: `serve(FakeEngine(...), api_keys=[...])`. All are stopped and checked after the test."""
    with contextlib.ExitStack() as stack:

        def start(engine: FakeEngine | None = None, **options) -> LiveServer:
            engine = engine or FakeEngine()
            options = {"page": PAGE} | options
            server = LiveServer(engine, create_app(engine, **options))
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def server(serve) -> LiveServer:
    """A server with the default fake engine."""
    return serve()
