"""HTTP bounds: headers, bodies and connections that come slowly, in masses or not at all."""

import contextlib
import socket
import time

import httpx
import pytest

from kvjax.serve.http_protocol import BoundedHttpProtocol, bounded_protocol

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def answer(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):  # closed while more was on its way
        while part := connection.recv(65536):
            received += part
    return received


@pytest.fixture
def impatient(serve, monkeypatch):
    monkeypatch.setattr(BoundedHttpProtocol, "headers_seconds", 0.3)
    monkeypatch.setattr(BoundedHttpProtocol, "body_seconds", 0.3)
    return serve()


@pytest.mark.parametrize("parts", [1, 100])
def test_headers_that_are_too_long(server, parts):
    with connect(server) as connection:
        connection.sendall(HEAD + b"X-Long: ")
        try:
            for _ in range(parts):
                connection.sendall(b"x" * (1_000_000 // parts))
        except OSError:
            pass  # it was closed already
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 431 ") or not received
    assert server.get("/live").status_code == 200
    assert not server.engine.asked


def test_too_many_headers(server):
    with connect(server) as connection:
        connection.sendall(HEAD + b"".join(b"a%d: b\r\n" % index for index in range(200)) + b"\r\n")
        received = answer(connection)
    assert received.startswith(b"HTTP/1.1 431 ")
    assert b"202 headers are more than 128" in received or b"203 headers" in received
    assert not server.engine.asked


def test_ordinary_ones_pass(server):
    headers = {f"x-{index}": "y" * 400 for index in range(100)}
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 2}, headers=headers).status_code == 200


def test_headers_that_do_not_end(impatient):
    with connect(impatient) as connection:
        connection.sendall(HEAD)
        began = time.monotonic()
        assert answer(connection).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 3


def test_headers_that_trickle(impatient):
    with connect(impatient) as connection:
        began = time.monotonic()
        try:
            for byte in HEAD * 3:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - began < 3


def test_a_connection_without_a_word_is_closed(impatient):
    with connect(impatient) as connection:
        assert answer(connection) == b""


def test_a_body_that_does_not_end(impatient):
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert answer(connection).startswith(b"HTTP/1.1 408 ")
    assert impatient.get("/live").status_code == 200


def test_a_long_answer_is_no_slow_request(impatient):
    impatient.engine.token_seconds = 0.1
    answered = impatient.post("/v1/completions", {"prompt": "x", "max_tokens": 8})
    assert answered.json()["usage"]["completion_tokens"] == 8


def test_a_connection_may_rest_between_requests(impatient):
    with httpx.Client(base_url=impatient.url) as client:
        for _ in range(2):
            assert client.get("/live").status_code == 200
            time.sleep(0.6)


def test_connections_beyond_the_most(serve, monkeypatch):
    monkeypatch.setattr(BoundedHttpProtocol, "max_connections", 5)
    server = serve()
    held = [connect(server) for _ in range(5)]
    time.sleep(0.2)
    with connect(server) as connection:
        assert answer(connection).startswith(b"HTTP/1.1 503 ")
    for each in held:
        each.close()
    time.sleep(0.2)
    assert server.get("/live").status_code == 200


def test_files_bound_connections(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    assert bounded_protocol().max_connections == 896
    monkeypatch.setattr("resource.getrlimit", lambda _: (1 << 20, 1 << 20))
    assert bounded_protocol() is BoundedHttpProtocol


@pytest.mark.parametrize(
    "path",
    ["/", "/live", "/health", "/version", "/metrics", "/state", "/v1/models", "/v1/models/fake", "/openapi.json"],
)
def test_every_get_answers_head(server, path):
    got, head = server.get(path), httpx.head(server.url + path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]


def test_head_of_what_is_not_there(server):
    assert httpx.head(f"{server.url}/nope").status_code == 404
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405
