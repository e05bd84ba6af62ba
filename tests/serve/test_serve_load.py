"""What happens to places: overload, clients that leave, silence, draining. Over real sockets."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
from fake_engine import FakeEngine
from live_server import wait_until
from test_serve_errors import error_of

from kvjax.serve.limits import Limits

pytestmark = pytest.mark.timing

CHAT = {"messages": [{"role": "user", "content": "x"}], "temperature": 0}
COMPLETION = {"prompt": "x", "temperature": 0, "max_tokens": 30}


@contextlib.contextmanager
def posted(server, path: str, body: dict):
    """A raw connection that has sent its request and leaves without a word."""
    data = json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(data)}", "", ""))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def state_of(server) -> list[str]:
    return [slot.state for slot in server.engine.stats().slots]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
class TestClientThatLeaves:
    """Its slot and its place in the queue are free again at once, in every phase."""

    def test_in_the_queue(self, serve, path, body, stream):
        server = serve(FakeEngine(slots=1))
        server.engine.hold = threading.Event()
        with posted(server, "/v1/completions", COMPLETION) as first:
            wait_until(lambda: server.engine.stats().running)
            with posted(server, path, body | {"stream": stream}):
                wait_until(lambda: server.engine.stats().waiting)
            wait_until(lambda: server.engine.cancelled)
            assert server.engine.stats().waiting == 0
            assert server.engine.reserved == 1
            server.engine.hold.set()
            assert b"200 OK" in first.recv(1000)  # the other request never noticed

    def test_while_it_is_tokenised(self, serve, path, body, stream):
        server = serve()
        server.engine.tokenizer.encode_seconds = 0.3
        with posted(server, path, body | {"stream": stream}):
            wait_until(lambda: server.engine.reserved)
        wait_until(lambda: not server.engine.reserved)
        time.sleep(0.4)  # past the end of the thread that tokenises
        assert not server.engine.asked

    def test_during_prefill(self, serve, path, body, stream):
        server = serve(FakeEngine(prefill_seconds=30))
        with posted(server, path, body | {"stream": stream}):
            wait_until(lambda: "prefill" in state_of(server))
        wait_until(lambda: server.engine.cancelled)
        wait_until(lambda: state_of(server) == ["free", "free"])

    def test_during_decode(self, serve, path, body, stream):
        server = serve(FakeEngine(slots=4, token_seconds=1))
        with posted(server, path, body | {"stream": stream, "n": 3}):
            wait_until(lambda: state_of(server).count("decode") == 3)
        wait_until(lambda: len(server.engine.cancelled) == 3)
        wait_until(lambda: state_of(server) == ["free"] * 4)

    def test_one_that_stays_is_answered(self, serve, path, body, stream):
        server = serve(FakeEngine(prefill_seconds=0.1))
        assert server.post(path, body | {"stream": stream}).status_code == 200
        assert not server.engine.cancelled


def test_half_a_body_holds_nothing(serve):
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        connection.sendall(b'Content-Length: 100\r\n\r\n{"prompt"')
        time.sleep(0.1)
        assert server.engine.reserved == 0
    assert server.get("/health").status_code == 200


def test_a_client_that_reads_slowly_holds_nobody_up(serve):
    server = serve(FakeEngine(max_model_len=100_000, script=lambda prompt, params: [97] * 60_000))
    body = {"prompt": "x", "max_tokens": 60_000, "stream": True, "logprobs": 3}
    with posted(server, "/v1/completions", body):
        wait_until(lambda: "decode" in state_of(server))
        assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
    wait_until(lambda: server.engine.cancelled)


class TestOverload:
    def test_it_is_503_at_once_with_when_to_retry(self, serve):
        server = serve(FakeEngine(slots=1, queue=1), max_queued=1)
        server.engine.hold = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            served = [pool.submit(server.post, "/v1/completions", COMPLETION) for _ in range(2)]
            wait_until(lambda: server.engine.reserved == 2)
            for stream in (False, True):
                answer = server.post("/v1/completions", COMPLETION | {"stream": stream})
                assert error_of(answer, 503)["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) > 0
            server.engine.hold.set()
            assert [each.result().status_code for each in served] == [200, 200]
        assert server.post("/v1/completions", COMPLETION).status_code == 200

    def test_it_is_refused_before_anything_is_tokenised(self, serve):
        server = serve(FakeEngine(slots=1, queue=0), max_queued=0)
        with server.engine.reserve():
            assert server.post("/v1/completions", COMPLETION).status_code == 503
        assert server.engine.tokenizer.encoded == 0

    def test_what_can_never_fit_is_not_to_be_retried(self, serve):
        server = serve(FakeEngine(slots=2, queue=3), max_queued=3)
        error = error_of(server.post("/v1/completions", {"prompt": ["a"] * 3, "n": 2}), 400)
        assert error["code"] == "too_many_completions"
        assert server.post("/v1/completions", {"prompt": ["a"] * 5, "max_tokens": 1}).status_code == 200

    def test_a_refused_request_leaves_no_place_taken(self, serve):
        server = serve(FakeEngine(slots=1, queue=0), max_queued=0)
        for _ in range(3):
            assert server.post("/v1/completions", {"prompt": [1] * 600}).status_code == 400
        assert server.post("/v1/completions", COMPLETION).status_code == 200


class TestSilence:
    def test_a_long_prefill_is_bridged_with_comments(self, serve):
        server = serve(FakeEngine(prefill_seconds=1), limits=Limits(keep_alive_seconds=0.1))
        answer = server.post("/v1/chat/completions", CHAT | {"stream": True})
        frames = answer.text.split("\n\n")
        assert frames[:2] == [": keep-alive"] * 2
        assert frames.count(": keep-alive") <= 10
        chunks = server.client().chat.completions.create(model="fake", stream=True, **CHAT)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello, wörld! 🙂"

    def test_a_failure_after_a_comment_is_an_event(self, serve):
        server = serve(FakeEngine(prefill_seconds=0.3, fail_after=0), limits=Limits(keep_alive_seconds=0.1))
        answer = server.post("/v1/chat/completions", CHAT | {"stream": True})
        assert answer.status_code == 200
        *_, error, done = [frame for frame in answer.text.split("\n\n") if frame]
        assert done == "data: [DONE]"
        assert json.loads(error[6:])["error"]["code"] == "generation_failed"

    def test_a_lively_stream_has_none(self, serve):
        server = serve(FakeEngine(token_seconds=0.02), limits=Limits(keep_alive_seconds=2))
        assert ": keep-alive" not in server.post("/v1/chat/completions", CHAT | {"stream": True}).text


def test_a_connection_is_used_again(serve):
    server = serve()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    used = set()
    for body in (COMPLETION, COMPLETION | {"stream": True}, {"prompt": ""}, COMPLETION):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        used.add(connection.sock)
    assert len(used) == 1
    connection.close()


class TestPhases:
    @pytest.mark.parametrize("phase", ["loading", "compiling", "draining", "stopped", "failed"])
    def test_health_tells_the_phase(self, serve, phase):
        server = serve(FakeEngine(phase=phase))
        answer = server.get("/health")
        assert answer.status_code == 503
        assert answer.json()["phase"] == phase
        assert int(answer.headers["retry-after"]) > 0
        assert server.get("/live").status_code == 200
        assert server.get("/metrics").status_code == 200
        assert server.get("/state").json()["phase"] == phase

    @pytest.mark.parametrize(
        ("phase", "code"), [("loading", "not_ready"), ("compiling", "not_ready"), ("draining", "draining")]
    )
    def test_nothing_else_is_served_then(self, serve, phase, code):
        server = serve(FakeEngine(phase=phase))
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            answer = server.post(path, body)
            assert error_of(answer, 503)["code"] == code
            assert int(answer.headers["retry-after"]) > 0
        assert error_of(server.post("/tokenize", {"prompt": "x"}), 503)["code"] == code
        assert error_of(server.get("/v1/models"), 503)["code"] == code

    def test_bad_input_is_bad_in_every_phase(self, serve):
        assert serve(FakeEngine(phase="loading")).post("/v1/completions", {"prompt": ""}).status_code == 400


class TestDrain:
    def test_running_requests_finish_and_new_ones_are_refused(self, serve):
        server = serve(FakeEngine(token_seconds=0.03))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.post, "/v1/completions", COMPLETION)
            wait_until(lambda: "decode" in state_of(server))
            drain = threading.Thread(target=server.engine.drain, args=(10,))
            drain.start()
            wait_until(lambda: server.engine.phase == "draining")
            assert error_of(server.post("/v1/completions", COMPLETION), 503)["code"] == "draining"
            assert server.get("/health").json()["phase"] == "draining"
            assert running.result().json()["choices"][0]["finish_reason"] == "stop"
            drain.join()

    def test_what_is_left_at_the_deadline_is_told(self, serve):
        server = serve(FakeEngine(slots=4, token_seconds=0.2))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/v1/completions", COMPLETION)
            stream = pool.submit(server.post, "/v1/completions", COMPLETION | {"stream": True})
            wait_until(lambda: server.engine.stats().generated_tokens >= 4)
            server.engine.drain(0.1)
            assert error_of(whole.result(), 503)["code"] == "draining"
            *_, error, done = [frame for frame in stream.result().text.split("\n\n") if frame]
            assert json.loads(error[6:])["error"]["code"] == "draining"
            assert done == "data: [DONE]"


def test_many_at_once_are_all_answered(serve):
    server = serve(FakeEngine(slots=4, queue=60, token_seconds=0.001), max_queued=60)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        bodies = [COMPLETION | {"stream": bool(i % 2), "seed": i} for i in range(48)]
        answers = list(pool.map(lambda body: server.post("/v1/completions", body), bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert server.engine.stats().finished == 48
