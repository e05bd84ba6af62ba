"""Every remote tier behind a bad network, guarded: calls end in time, no byte is wrong, and it heals."""

import time
from urllib.parse import urlsplit

import pytest

from kvjax.store.guard import Guarded
from kvjax.store.names import object_name
from kvjax.store.tier import Tier, TierError
from tests.store.contract import SIZE, blob, fill, key
from tests.store.faulty_proxy import FAULTS, FaultyProxy
from tests.store.test_breaker import Clock
from tests.store.web_server import WebServer

pytestmark = pytest.mark.timing

DEADLINE = 0.12  # seconds, of the guard while there are faults
PATIENT = 20.0  # of the tiers, which are not trusted here, and of the guard while there are none
SLACK = 1.5  # that a machine with other work may take to notice a deadline


@pytest.fixture
def behind_proxy(request):
    """Starts a proxy before a port."""
    proxies = []

    def start(port: int | None) -> FaultyProxy:
        proxies.append(FaultyProxy(port))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.stop()


@pytest.fixture
def redis(redis_url, behind_proxy, opened) -> tuple[Tier, FaultyProxy]:
    fill(opened(redis_url, timeout=PATIENT))
    port = urlsplit(redis_url).port
    proxy = behind_proxy(port)
    return opened(redis_url.replace(str(port), str(proxy.port)), timeout=PATIENT), proxy


@pytest.fixture
def s3(s3_url, s3_server, behind_proxy, opened) -> tuple[Tier, FaultyProxy]:
    fill(opened(s3_url, timeout=PATIENT))
    port = urlsplit(s3_server).port
    proxy = behind_proxy(port)
    return opened(s3_url.replace(str(port), str(proxy.port)), timeout=PATIENT), proxy


@pytest.fixture
def gcs(gcs_url, gcs_server, behind_proxy, opened, monkeypatch) -> tuple[Tier, FaultyProxy]:
    fill(opened(gcs_url, timeout=PATIENT))
    proxy = behind_proxy(urlsplit(gcs_server).port)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{proxy.port}")
    return opened(gcs_url, timeout=PATIENT), proxy


@pytest.fixture
def web(behind_proxy, opened):
    server = WebServer()
    for n in range(3):
        server.files[f"/kv/{object_name(key(n))}"] = bytes(blob(n))
    proxy = behind_proxy(server.server_address[1])
    yield opened(f"http://127.0.0.1:{proxy.port}/kv", timeout=PATIENT), proxy
    server.stop()


def read(guard: Guarded, number: int, deadline: float) -> str:
    """What came of it, in a word; late or wrong is a failure of the test."""
    guard.deadline = deadline
    into = bytearray(SIZE)
    begun = time.monotonic()
    try:
        outcome = "found" if guard.read(key(number), memoryview(into)) else "missing"
    except TierError as error:
        outcome = error.reason
    assert time.monotonic() - begun < deadline + SLACK
    assert into == (blob(number) if outcome == "found" else bytes(SIZE))
    return outcome


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["redis", "s3", "gcs", "web"])
def test_a_bad_network(kind, fault, request):
    tier, proxy = request.getfixturevalue(kind)
    clock = Clock()
    guard = Guarded(tier, PATIENT, attempts=2, threads=8, failures=2, pause=5.0, backoff=0.001, clock=clock)
    assert read(guard, 1, PATIENT) == "found"
    proxy.set(fault)
    for _ in range(6):
        assert read(guard, 1, DEADLINE) in ("timeout", "io", "length", "breaker")
        if guard.state == "open":
            break
    assert guard.state == "open", guard.errors
    assert read(guard, 1, DEADLINE) == "breaker"
    proxy.set(None)
    for _ in range(4):  # a connection of before may still be broken, and a probe may get it
        clock.now += 5.0
        if read(guard, 1, PATIENT) == "found":
            break
    assert guard.state == "closed", guard.errors
    assert [read(guard, n, PATIENT) for n in range(4)] == ["found"] * 3 + ["missing"]


@pytest.mark.parametrize("kind", ["redis", "s3", "gcs", "web"])
def test_a_tier_by_itself_ends_about_its_timeout(kind, request):
    """Against a network that stalls; what drips needs the guard."""
    tier, proxy = request.getfixturevalue(kind)
    if kind == "redis":
        tier._client.connection_pool.connection_kwargs["socket_timeout"] = 0.1
    elif kind == "web":
        tier._client.timeout = 0.1
    tier.timeout = 0.1
    proxy.set("stall")
    for call in (lambda: tier.read(key(1), memoryview(bytearray(SIZE))), lambda: tier.contains(key(1))):
        begun = time.monotonic()
        with pytest.raises(TierError) as error:
            call()
        assert error.value.reason == "timeout"
        assert time.monotonic() - begun < 0.1 + SLACK
