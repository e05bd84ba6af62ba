"""Host names: a page whose name resolves to this machine gets nothing, whatever it asks."""

import http.client

import pytest

from kvjax.serve.hosts import AllowedHosts, host_name

ASK = b'{"prompt": "x", "max_tokens": 2}'


def ask(server, host: str | None, path: str = "/v1/completions", method: str = "POST", key: str | None = None):
    """Status, headers and body of a request with that Host header; None sends none."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    if key is not None:
        connection.putheader("Authorization", f"Bearer {key}")
    body = ASK if method == "POST" else b""
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    read = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return read


FOREIGN = (
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "EVIL.example."),
    *("10.0.0.1", "[::2]:80", "localhost:80:80", "x@localhost", "", None),
)
LOOPBACK = ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.9.1:1", "[::1]:8000", "localhost.")


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/state", "/metrics", "/", "/openapi.json"])
def test_without_keys_only_loopback_names_are_served(server, host, path):
    method = "POST" if path == "/v1/completions" else "GET"
    status, _, body = ask(server, host, path, method)
    assert status == 403
    assert b"host_not_allowed" in body
    assert b"--allowed-hosts" in body
    assert not server.engine.asked


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.9.1:1", "[::1]:8000", "localhost."]
)
def test_loopback_names_are_served(server, host):
    assert ask(server, host)[0] == 200


def test_two_host_headers_are_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("GET", "/v1/models")
    connection.putheader("Host", "localhost")
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


@pytest.mark.parametrize("path", ["/live", "/health"])
def test_probes_ask_under_any_name(server, path):
    assert ask(server, "10.1.2.3:8000", path, "GET")[0] == 200


def test_with_keys_any_name_is_served_unless_names_are_given(serve):
    assert ask(serve(api_keys=["k"]), "any.example", key="k")[0] == 200
    server = serve(api_keys=["k"], allowed_hosts=AllowedHosts.resolve(["a.example", "*.b.example"], keys=True))
    assert [ask(server, host, key="k")[0] for host in ("a.example", "x.b.example", "localhost")] == [200] * 3
    assert [ask(server, host, key="k")[0] for host in ("b.example", "xa.example", "c.example")] == [403] * 3


def test_names_can_be_given_without_keys(serve):
    server = serve(allowed_hosts=AllowedHosts.resolve(["box.lan"], keys=False, bound="192.168.1.5"))
    assert [ask(server, host)[0] for host in ("box.lan", "192.168.1.5:8000", "localhost")] == [200] * 3
    assert ask(server, "other.lan")[0] == 403


@pytest.mark.parametrize("path", ["/health/", "/live/", "/v1/models/", "//v1/models", "/docs/"])
def test_no_redirect_is_made(server, path):
    status, headers, _ = ask(server, "localhost", path, "GET")
    assert status in (200, 404)
    assert "location" not in {name.lower() for name in headers}


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.b:1", "a.b"), ("[::1]:80", "::1"), ("[::1]", "::1"), ("::1", ":"), ("a.", "a"), ("a:b", "a:b")],
)
def test_names_of_headers(header, name):
    assert host_name(header) == name
