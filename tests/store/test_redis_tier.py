"""The tier in Redis, against a real server."""

import os
import shutil
import socket
import subprocess
import threading

import pytest
import redis

from kvjax.store.guard import Guarded
from kvjax.store.names import object_name
from kvjax.store.tier import Tier, TierError
from kvjax.store.url import open_tier
from tests.store.contract import TierContract, blob, fill, key, read
from tests.store.redis_server import RedisServer, free_port
from tests.store.test_breaker import Clock


@pytest.fixture
def own_server(tmp_path):
    """Starts servers with options of a test's own."""
    servers = []

    def start(*options: str, port: int | None = None) -> RedisServer:
        servers.append(RedisServer(tmp_path, *options, port=port))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


class TestRedis(TierContract):
    @pytest.fixture
    def tier(self, redis_url, opened) -> Tier:
        return fill(opened(redis_url, timeout=20.0))

    @pytest.fixture
    def client(self, redis_server):
        with redis.Redis(port=redis_server.port) as client:
            yield client

    def test_an_empty_value_is_there_but_too_short(self, tier, client):
        client.set(tier._name(key(5)), b"")
        assert tier.contains(key(5))
        with pytest.raises(TierError) as error:
            read(tier, 5)
        assert error.value.reason == "length"

    def test_strangers_are_not_listed(self, tier, client):
        client.set(f"{tier._prefix}notes", b"x")
        client.set(f"{tier._prefix}zz/{key(1)}", b"x")
        client.set(f"other/{key(1)[:2]}/{key(1)}", b"x")
        client.lpush(tier._name(key(9)), b"not a string")
        assert {stored.key for stored in tier.scan()} == {key(0), key(1), key(2)}
        with pytest.raises(TierError) as error:
            read(tier, 9)
        assert error.value.reason == "io"

    def test_a_scan_of_several_pages(self, tier, client):
        many = client.pipeline(transaction=False)
        for n in range(2500):
            many.set(tier._name(key(n)), b"x" * (1 + n % 7))
        many.execute()
        found = {stored.key: stored.nbytes for stored in tier.scan()}
        assert found == {key(n): 1 + n % 7 for n in range(2500)}

    def test_databases_are_apart(self, tier, redis_url, opened):
        assert not opened(redis_url.replace("/0?", "/1?")).contains(key(1))


def test_a_full_server_says_so(own_server, opened):
    tier = opened(own_server("--maxmemory", "3mb", "--maxmemory-policy", "noeviction").url, timeout=20.0)
    with pytest.raises(TierError) as error:
        [tier.write(key(n), blob(n, 1_000_000)) for n in range(9)]
    assert error.value.reason == "full"
    tier.delete(key(0))


def test_passwords_are_used_and_not_printed(own_server, opened):
    server = own_server("--requirepass", "s3cret/@:")
    place = f"127.0.0.1:{server.port}/0"
    tier = opened(f"redis://:s3cret%2F%40%3A@{place}", timeout=20.0)
    assert not tier.contains(key(1))
    for url in (f"redis://{place}", f"redis://:wr0ng@{place}"):
        with pytest.raises(TierError) as error:
            opened(url, timeout=20.0).contains(key(1))
        assert error.value.reason == "refused"
        assert "wr0ng" not in str(error.value)
    assert "s3cret" not in tier.where


def test_rediss_checks_the_certificate(own_server, tmp_path, monkeypatch, opened):
    openssl = shutil.which("openssl") or pytest.skip("no openssl to make a certificate with")
    made = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    made += [
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    port = free_port()
    files = ["--tls-cert-file", str(tmp_path / "cert.pem"), "--tls-key-file", str(tmp_path / "key.pem")]
    try:
        own_server("--tls-port", str(port), *files, "--tls-auth-clients", "no")
    except RuntimeError:
        pytest.skip("this redis-server was built without TLS")
    url = f"rediss://127.0.0.1:{port}"
    with pytest.raises(TierError) as error:
        opened(url, timeout=20.0).contains(key(1))
    assert error.value.reason == "io"
    monkeypatch.setitem(os.environ, "SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    tier = fill(opened(url, timeout=20.0))
    assert read(tier, 1) == bytes(blob(1))


def test_a_server_that_dies_and_comes_back(own_server, opened):
    clock = Clock()
    server = own_server()
    guard = Guarded(opened(server.url, timeout=5.0), 5.0, failures=2, backoff=0.001, pause=30.0, clock=clock)
    fill(guard)
    server.kill()
    for _ in range(2):
        with pytest.raises(TierError) as error:
            read(guard, 1)
        assert error.value.reason == "io"
    assert guard.state == "open"
    server.start()
    clock.now += 30
    assert read(guard, 1) is None, "it kept nothing, but it answers"
    assert guard.state == "closed"


def test_nobody_listens(opened):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TierError) as error:
        opened(f"redis://127.0.0.1:{port}").contains(key(1))
    assert error.value.reason == "io"


class StandIn(threading.Thread):
    """A server that holds three names, and answers nothing before it was asked for as many as a test expects."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(daemon=True)
        self.names, self.asked, self.expected = names, [], 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.start()

    def run(self) -> None:
        peer, _ = self.socket.accept()
        with peer, peer.makefile("rb") as lines:
            waiting: list[bytes] = []
            while head := lines.readline():
                words = []
                for _ in range(int(head[1:])):
                    words.append(lines.read(int(lines.readline()[1:]) + 2)[:-2].decode())
                if words[0] not in ("EXISTS", "TOUCH"):  # a client introduces itself
                    peer.sendall(b"%1\r\n+proto\r\n:3\r\n" if words[0] == "HELLO" else b"+OK\r\n")
                    continue
                self.asked.append(words)
                waiting.append(b":%d\r\n" % (words[1] in self.names))
                if len(waiting) >= self.expected:
                    peer.sendall(b"".join(waiting))
                    waiting.clear()


def test_many_keys_take_one_round_trip():
    server = StandIn([f"kvjax/{object_name(key(n))}" for n in range(3)])
    with server.socket:
        ask_for_many(server)
    server.join(10)


def ask_for_many(server: StandIn) -> None:
    tier = open_tier(f"redis://127.0.0.1:{server.socket.getsockname()[1]}", timeout=5.0)
    keys = [key(n) for n in (2, 7, 0, 1)]
    server.expected = 4
    assert tier.contains_many(keys) == [True, False, True, True]
    assert tier.touch(keys) == [True, False, True, True]
    names = [f"kvjax/{object_name(key)}" for key in keys]
    assert server.asked[:4] == [["EXISTS", name] for name in names]
    assert server.asked[4:] == [["TOUCH", name] for name in reversed(names)], "the end of the chain first"
    tier.close()
