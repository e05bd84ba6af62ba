"""The read-only tier on a web server, against one that serves files and one that misbehaves."""

import gzip
import time
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from kvjax.store import web
from kvjax.store.block import CorruptBlockError
from kvjax.store.guard import Guarded
from kvjax.store.names import object_name
from kvjax.store.rejected import RejectedKeys
from kvjax.store.tier import Tier, TierError
from tests.store.chains import FORMAT, blob_of, names_of
from tests.store.contract import SIZE, ReadOnlyContract, blob, key, read
from tests.store.test_breaker import Clock
from tests.store.web_server import Script, WebServer, answer


@pytest.fixture
def server():
    server = WebServer()
    for n in range(3):
        server.files[f"/pub/kv/{object_name(key(n))}"] = bytes(blob(n))
    yield server
    server.stop()


@pytest.fixture
def tier(server, opened) -> Tier:
    return opened(f"{server.url}/pub/kv/", timeout=20.0)


def path(number: int) -> str:
    return f"/pub/kv/{object_name(key(number))}"


def always(status: int, body: bytes = b"", **headers: str) -> Script:
    return lambda request: answer(request, status, body, **headers)


def reason_of_read(tier: Tier, number: int = 1, size: int = SIZE) -> str:
    with pytest.raises(TierError) as error:
        read(tier, number, size)
    return error.value.reason


class TestWeb(ReadOnlyContract):
    @pytest.fixture
    def tier(self, tier) -> Tier:
        return tier


def test_it_cannot_be_scanned(tier):
    with pytest.raises(TierError) as error:
        tier.scan()
    assert error.value.reason == "refused"


def test_contains_asks_for_no_body(tier, server):
    assert tier.contains(key(1))
    assert server.asked == [("HEAD", path(1))]


@pytest.mark.parametrize("status", [404, 410])
def test_not_there(tier, server, status):
    server.scripts[path(1)] = always(status)
    assert read(tier, 1) is None
    assert not tier.contains(key(1))


@pytest.mark.parametrize(
    ("status", "reason"),
    [(500, "io"), (503, "io"), (429, "io"), (204, "io"), (206, "io"), (304, "io"), (401, "refused"), (403, "refused")],
)
def test_other_answers(tier, server, status, reason):
    server.scripts[path(1)] = always(status, b"" if status in (204, 304) else bytes(blob(1)))
    assert reason_of_read(tier) == reason
    with pytest.raises(TierError) as error:
        tier.contains(key(1))
    assert error.value.reason == reason
    assert read(tier, 2) == bytes(blob(2))


@pytest.mark.parametrize("size", ["0", "19999", "20001", "9999999999999", "-1", "x", "20000, 20001"])
def test_another_length_announced_ends_it_before_the_body(tier, server, size):
    def announces(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", size)
        request.end_headers()
        time.sleep(0.05)  # there is no body, so whoever waits for it is late

    server.scripts[path(1)] = announces
    assert reason_of_read(tier) in ("length", "io")  # what is no number at all is httpx's to refuse
    assert read(tier, 2) == bytes(blob(2))


def test_without_a_length_it_reads_so_far_and_no_further(tier, server):
    sent = []

    def endless(request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, Content_Length="")
        while len(sent) < 1000:
            request.wfile.write(b"x" * 65536)
            sent.append(1)

    server.scripts[path(1)] = endless
    assert reason_of_read(tier) == "length"
    assert len(sent) < 1000
    server.scripts[path(1)] = always(200, bytes(blob(1)), Content_Length="")
    assert read(tier, 1) == bytes(blob(1))
    assert reason_of_read(tier, size=SIZE + 1) == "length"


def test_a_body_that_breaks_off(tier, server):
    def breaks_off(request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, bytes(blob(1))[: SIZE // 2], Content_Length=str(SIZE))

    server.scripts[path(1)] = breaks_off
    assert reason_of_read(tier) == "io"
    assert read(tier, 2) == bytes(blob(2))


def test_chunked(tier, server):
    def chunked(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for at in range(0, SIZE, 6000):
            piece = bytes(blob(1))[at : at + 6000]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        request.wfile.write(b"0\r\n\r\n")

    server.scripts[path(1)] = chunked
    assert read(tier, 1) == bytes(blob(1))
    assert reason_of_read(tier, size=SIZE - 1) == "length"
    assert reason_of_read(tier, size=SIZE + 1) == "length"


def test_encoded_bytes_are_not_taken_for_the_object(tier, server):
    packed = gzip.compress(b"x" * SIZE)
    server.scripts[path(1)] = always(200, packed, Content_Encoding="gzip")
    assert reason_of_read(tier, size=len(packed)) == "io"


@pytest.mark.timing
def test_a_body_that_drips(opened, server):
    def drips(request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, Content_Length=str(SIZE))
        for _ in range(200):
            request.wfile.write(b"x")
            time.sleep(0.01)

    tier = opened(f"{server.url}/pub/kv", timeout=0.1)
    server.scripts[path(1)] = drips
    begun = time.monotonic()
    assert reason_of_read(tier) == "timeout"
    assert time.monotonic() - begun < 1.0


# Harmed objects


def test_a_harmed_object_is_downloaded_once(opened, server):
    """As the store does: read, prove, reject."""
    name = names_of(1)[0]
    harmed = blob_of(name)
    harmed[-1] ^= 1
    place = f"/pub/kv/{object_name(name.hex)}"
    server.files[place] = harmed.tobytes()
    tier = Guarded(opened(f"{server.url}/pub/kv", timeout=20.0), 20.0)
    computed = 0
    for _ in range(5):  # requests
        buffer = np.zeros(FORMAT.nbytes, np.uint8)
        if tier.contains(name.hex) and tier.read(name.hex, memoryview(buffer)):
            with pytest.raises(CorruptBlockError):
                FORMAT.check(buffer, name)
            tier.reject(name.hex)
        computed += 1
    assert computed == 5
    assert server.asked == [("HEAD", place), ("GET", place)]
    assert tier.read(key(1), memoryview(bytearray(SIZE)))
    tier.close()


def test_a_rejected_object_is_asked_for_again_after_a_while(monkeypatch, server, opened):
    clock = Clock()
    monkeypatch.setattr(web, "RejectedKeys", lambda: RejectedKeys(clock=clock))
    tier = opened(f"{server.url}/pub/kv", timeout=20.0)
    tier.reject(key(1))
    clock.now += 599
    assert read(tier, 1) is None
    assert not server.asked
    clock.now += 1
    assert read(tier, 1) == bytes(blob(1))


def test_only_keys_can_be_rejected_and_not_after_close(tier):
    for name in ("", "../x", "A" * 64):
        with pytest.raises(TierError):
            tier.reject(name)
    tier.close()
    with pytest.raises(TierError):
        tier.reject(key(1))


def test_the_memory_of_rejected_keys_is_bounded():
    clock = Clock()
    rejected = RejectedKeys(seconds=10.0, capacity=3, clock=clock)
    for n in (0, 1, 2, 0, 3):
        rejected.add(key(n))
        clock.now += 1
    assert [key(n) in rejected for n in range(4)] == [True, False, True, True], "rejected first, forgotten first"
    assert len(rejected) == 3
    clock.now += 7
    assert [key(n) in rejected for n in range(4)] == [True, False, False, True]
    clock.now += 10
    assert len(rejected) == 0


# Redirects


def test_redirects_are_followed(tier, server):
    server.scripts[path(1)] = always(302, Location=f"{server.url}/a")
    server.scripts["/a"] = always(307, Location="/b")
    server.scripts["/b"] = always(301, Location=path(2))
    assert read(tier, 1) == bytes(blob(2))
    assert tier.contains(key(1))
    assert [method for method, _ in server.asked] == ["GET"] * 4 + ["HEAD"] * 4


def test_redirects_end(tier, server):
    server.scripts[path(1)] = always(302, Location=path(1))
    assert reason_of_read(tier) == "io"
    assert len(server.asked) == 4


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://[", "gopher:x"])
def test_redirects_to_nonsense(tier, server, target):
    server.scripts[path(1)] = always(302, Location=target)
    assert reason_of_read(tier) in ("io", "refused")


def test_passwords_stay_with_their_server(server, opened):
    """Sent to the place that the URL names, not to where it redirects, and never printed."""
    other = WebServer()
    seen = {}

    def remember(request: BaseHTTPRequestHandler) -> None:
        seen[request.server.server_address[1]] = request.headers.get("Authorization")
        if request.server is server:
            answer(request, 302, Location=f"{other.url}{path(1)}")
        else:
            answer(request, 403)

    try:
        server.scripts[path(1)] = other.scripts[path(1)] = remember
        tier = opened(f"{server.url.replace('//', '//me:s3cret%40@')}/pub/kv", timeout=20.0)
        with pytest.raises(TierError) as error:
            read(tier, 1)
        assert "s3cret" not in str(error.value)
        assert seen == {server.server_address[1]: "Basic bWU6czNjcmV0QA==", other.server_address[1]: None}
    finally:
        other.stop()
