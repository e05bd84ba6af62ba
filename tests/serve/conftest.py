"""Servers for tests: one of its own, or one that a whole file shares."""

import contextlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # the tests here share two helpers

from fake_engine import FakeEngine
from live_server import LiveServer, wait_until


@pytest.fixture
def serve():
    """Starts servers: `serve(FakeEngine(...), api_keys=[...])`. All are stopped and checked afterwards."""
    with contextlib.ExitStack() as stack:

        def start(engine: FakeEngine | None = None, **options) -> LiveServer:
            server = LiveServer(engine, **options)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="module")
def shared_server():
    server = LiveServer()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server) -> LiveServer:
    """A server with the default fake engine, whose memory of what was asked is empty."""
    engine = shared_server.engine
    engine.asked.clear()
    engine.cancelled.clear()
    yield shared_server
    shared_server.close_clients()
    wait_until(lambda: not engine.reserved)
    engine.check_integrity()
