"""Keys: closed by default, on every route there is, and never told."""

import hashlib
import logging

import httpx
import pytest
from fake_engine import FakeEngine
from fastapi.routing import iter_route_contexts
from live_server import LiveServer, wait_until

from kvjax.serve.app import create_app
from kvjax.serve.security import OPEN_PATHS, Guard, Keyring

KEYS = ["first-key", "second-key"]


@pytest.fixture(scope="module")
def locked():
    server = LiveServer(api_keys=KEYS)
    yield server
    server.stop()


def all_routes() -> list[tuple[str, str]]:
    """Method and path of every route of the application, its OpenAPI document included."""
    return [
        (method, context.path.replace("{model:path}", "fake"))
        for context in iter_route_contexts(create_app(FakeEngine()).routes)
        for method in context.methods or ()
    ]


def test_the_list_of_routes_is_the_real_one():
    paths = {path for _, path in all_routes()}
    assert paths >= {"/", "/health", "/live", "/version", "/metrics", "/state", "/openapi.json"}
    assert paths >= {"/v1/models", "/v1/models/fake", "/v1/completions", "/v1/chat/completions"}
    assert paths >= {"/tokenize", "/detokenize"}


@pytest.mark.parametrize(("method", "path"), sorted(set(all_routes())))
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic first-key", "Bearer", "first-key"])
def test_every_route_but_three_wants_a_key(locked, method, path, header):
    headers = {} if header is None else {"Authorization": header}
    answer = httpx.request(method, locked.url + path, headers=headers)
    if path in OPEN_PATHS:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    if method != "HEAD":
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/nope", "//live", "/live/", "/health/../metrics", "/LIVE", "/%6cive/x"])
def test_unknown_paths_are_closed_too(locked, path):
    assert httpx.get(locked.url + path).status_code == 401


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked, key):
    for scheme in ("Bearer", "bearer"):
        answer = httpx.get(f"{locked.url}/v1/models", headers={"Authorization": f"{scheme} {key}"})
        assert answer.status_code == 200


def test_without_keys_nobody_needs_one(server):
    assert server.get("/v1/models").status_code == 200


def test_open_paths_tell_nothing_of_requests(locked):
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok", "phase": "ready"}
    assert httpx.get(f"{locked.url}/live").json() == {"status": "alive"}


def test_the_document_says_what_wants_a_key(locked):
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    document = httpx.get(f"{locked.url}/openapi.json", headers=headers).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in OPEN_PATHS)
            assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)


def test_keys_are_held_as_digests():
    keyring = Keyring.of(KEYS)
    assert "first-key" not in repr(keyring)
    assert keyring.find(b"first-key") == hashlib.sha256(b"first-key").digest()
    assert keyring.find(b"first-ke") is None
    assert keyring.find(b"") is None


def test_no_key_is_ever_logged(locked, caplog):
    with caplog.at_level(logging.DEBUG):
        for key in (*KEYS, "wrong-key"):
            httpx.get(f"{locked.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    wait_until(lambda: "401" in ours(caplog))
    assert "-key" not in ours(caplog)


def ours(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("kvjax"))


class TestSalt:
    """What separates the caches of different keys."""

    def test_several_keys_never_share(self, locked):
        body = {"prompt": "x", "cache_salt": "same", "max_tokens": 1}
        salts = set()
        for key in KEYS:
            locked.engine.asked.clear()
            headers = {"Authorization": f"Bearer {key}"}
            for _ in range(2):
                locked.post("/v1/completions", body, headers=headers)
            [(_, _, first, _), (_, _, again, _)] = locked.engine.asked
            assert first == again
            assert key not in first
            assert "same" not in first
            salts.add(first)
        assert len(salts) == 2

    def test_requests_of_one_key_may_still_separate(self):
        keyring = Keyring.of(KEYS)
        digest = keyring.find(b"first-key")
        assert keyring.salt(digest, "") != keyring.salt(digest, "a")

    def test_one_key_or_none_keeps_the_requests_own(self):
        assert Keyring.of([]).salt(None, "a") == "a"
        one = Keyring.of(["only"])
        assert one.salt(one.find(b"only"), "a") == "a"


async def test_anything_but_http_is_closed():
    """A protocol nobody thought of is not let through."""
    sent = []

    async def send(message):
        sent.append(message)

    async def app(*_):
        raise AssertionError("a websocket came through")

    await Guard(app, Keyring.of(KEYS))({"type": "websocket", "path": "/live"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_page_may_load_nothing_from_elsewhere(server):
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert server.get("/").headers["x-content-type-options"] == "nosniff"


def test_no_other_site_may_read_the_answers(server):
    answer = server.get("/v1/models", headers={"Origin": "https://example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = httpx.options(f"{server.url}/v1/completions", headers={"Origin": "https://example.com"})
    assert preflight.status_code == 405
