"""Servers that the tests of remote tiers talk to: real ones where there are any, all on this machine."""

import contextlib
import itertools
import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvjax.store.tier import Tier
from kvjax.store.url import open_tier
from tests.store.gcs_server import GcsServer
from tests.store.redis_server import RedisServer

pytest.register_assert_rewrite("tests.store.contract")


@pytest.fixture(scope="session")
def prefixes() -> Iterator[str]:
    """Prefixes nobody has used: each test has a place of its own on a server that all share."""
    return (f"tests/t{n}" for n in itertools.count())


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of moto's S3 with a bucket `kvjax-test`."""
    server = pytest.importorskip("moto.server", reason="moto[s3], flask and flask-cors are not installed (extra `dev`)")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/kvjax-test", method="PUT"), timeout=30).close()
    yield url
    moto.stop()


@pytest.fixture
def s3_url(s3_server, prefixes, monkeypatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return f"s3://kvjax-test/{next(prefixes)}?endpoint={s3_server}&region=us-east-1"


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    server = GcsServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.url
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def gcs_url(gcs_server, prefixes, monkeypatch) -> str:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs_server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
    return f"gs://kvjax-test/{next(prefixes)}"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def redis_url(redis_server, prefixes) -> str:
    return f"{redis_server.url}?prefix={next(prefixes)}"


@pytest.fixture
def opened() -> Iterator[Callable[..., Tier]]:
    """`open_tier`, of tiers that are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def open_and_close(url: str, **options: Any) -> Tier:
            tier = open_tier(url, **options)
            stack.callback(tier.close)
            return tier

        yield open_and_close
