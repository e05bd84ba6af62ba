"""A real uvicorn on a free port, in a thread, with a fake engine behind it."""

import socket
import threading
import time
from collections.abc import Callable

import httpx
import openai
import uvicorn
from fake_engine import FakeEngine

from kvjax.serve.app import create_app
from kvjax.serve.lifecycle import app_config

PAGE = "<!doctype html><title>page</title>"


class LiveServer:
    """The address and the engine of a running server; `options` are those of `create_app`."""

    def __init__(self, engine: FakeEngine | None = None, **options) -> None:
        self.engine = engine or FakeEngine()
        app = create_app(self.engine, **({"page": PAGE} | options))
        self._clients: list[openai.OpenAI] = []
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
        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **options))
        return self._clients[-1]

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def stop(self) -> None:
        self.close_clients()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.engine.check_integrity()


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
