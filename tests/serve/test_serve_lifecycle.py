"""Start, drain and death of a real process."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fake_engine import FakeEngine
from live_server import wait_until

from kvjax.serve import lifecycle
from kvjax.serve.config import ServeConfig
from tests.engine import tiny

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BODY = {"prompt": "x", "temperature": 0, "max_tokens": 30}


class Process:
    """A server of its own process; `log` grows as it writes."""

    def __init__(self, options: dict, *flags: str) -> None:
        command = [sys.executable, str(HERE / "serve_fake.py"), json.dumps(options), *flags]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "PYTHONUNBUFFERED": "1"}
        self._popen = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._popen.stdout:
            self.log += line

    def wait_for(self, pattern: str, seconds: float = 30) -> re.Match:
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.log)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.log}"
            assert self._popen.poll() is None or self._reader.is_alive(), self.log
            time.sleep(0.01)
        return found

    @property
    def url(self) -> str:
        return self.wait_for(r"listening on (http://\S+)")[1]

    def ready(self) -> "Process":
        self.wait_for("ready after")
        return self

    def signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def exit_status(self, seconds: float = 15) -> int:
        status = self._popen.wait(seconds)
        self._reader.join(5)
        return status

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join(5)
        self._popen.stdout.close()


@pytest.fixture
def process():
    with contextlib.ExitStack() as stack:

        def start(options: dict | None = None, *flags: str) -> Process:
            started = Process(options or {}, *flags)
            stack.callback(started.close)
            return started

        yield start


def test_it_answers_while_it_loads_and_stops_when_told(process):
    server = process({"start_seconds": 1.0})
    with httpx.Client(base_url=server.url, timeout=10) as client:
        server.wait_for("building")
        assert client.get("/live").status_code == 200
        assert client.get("/health").json()["phase"] == "compiling"
        assert client.post("/v1/completions", json=BODY).status_code == 503
        server.ready()
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=BODY).status_code == 200
    assert re.search(r"weights +0\.0 s\n", server.log)  # the start-up report
    server.signal(signal.SIGTERM)
    assert server.exit_status() == 0
    assert "stopped" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish(process, number):
    server = process({"token_seconds": 0.05}).ready()
    with httpx.Client(base_url=server.url, timeout=20) as client:
        lines = []
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            for line in stream.iter_lines():
                if not lines:
                    server.signal(number)
                    server.wait_for("draining 1 requests")
                    refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
                    assert refused.status_code == 503
                    assert refused.json()["error"]["code"] == "draining"
                    assert httpx.get(f"{server.url}/health").json()["phase"] == "draining"
                lines.append(line)
    assert '"finish_reason":"stop"' in lines[-4]
    assert lines[-2] == "data: [DONE]"
    assert server.exit_status() == 0


def test_the_deadline_cancels_what_is_left(process):
    server = process({"token_seconds": 5}, "--shutdown-timeout", "0.3").ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=BODY, timeout=20)
        wait_until(lambda: httpx.get(f"{server.url}/state").json()["running"])
        server.signal(signal.SIGTERM)
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "draining"
    assert server.exit_status() == 0


def test_a_second_signal_leaves_at_once(process):
    server = process({"token_seconds": 5}).ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=BODY, timeout=20)
        wait_until(lambda: httpx.get(f"{server.url}/state").json()["running"])
        server.signal(signal.SIGTERM)
        server.wait_for("draining 1 requests")
        server.signal(signal.SIGTERM)
        assert server.exit_status(3) == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            answer.result()


@pytest.mark.parametrize("hangs", [["drain"], ["close"], ["drain", "close"]])
def test_an_engine_that_hangs_ends_with_the_process(process, hangs):
    server = process({"hangs": hangs}, "--shutdown-timeout", "0.5").ready()
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.exit_status() == 0
    assert time.monotonic() - began < 0.5 + 2
    assert ("ending all the same, without kvjax-close" in server.log) == ("close" in hangs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once_while_the_engine_closes(process, number):
    server = process({"hangs": ["close"]}).ready()
    server.signal(signal.SIGTERM)
    server.wait_for("closing")
    server.signal(number)
    assert server.exit_status(3) == 128 + number


def test_a_signal_while_loading_does_not_wait_for_the_load(process):
    server = process({"start_seconds": 60})
    assert httpx.get(f"{server.url}/live").status_code == 200
    server.signal(signal.SIGTERM)
    assert server.exit_status(10) == 0


def test_an_engine_that_dies_ends_the_process(process):
    server = process({"fails": "when asked"}).ready()
    httpx.post(f"{server.url}/v1/completions", json=BODY)
    assert server.exit_status() == 1
    assert "the engine failed: RuntimeError: the device is gone" in server.log


def test_an_engine_that_cannot_start_ends_the_process(process):
    server = process({"fails": "at start"})
    assert server.exit_status(30) == 1
    assert "the engine failed: RuntimeError: the device is gone" in server.log
    assert "Traceback" not in server.log


def test_what_does_not_fit_is_the_operators_mistake(process):
    server = process({"fails": "for memory"})
    assert server.exit_status(30) == 2
    assert "kvjax: the weights need 9 GiB; 4 GiB are free" in server.log
    assert "MemoryError" not in server.log
    assert "Traceback" not in server.log


def test_a_taken_port_is_told_before_the_model_loads(process):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = process({}, "--port", str(port))
        assert server.exit_status(30) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in server.log
    assert "choose another with --port" in server.log
    assert "building" not in server.log
    assert "Traceback" not in server.log


class TestBind:
    def test_a_host_that_is_not_here(self):
        with pytest.raises(lifecycle.StartError, match=r"no address of this machine|cannot listen on"):
            lifecycle.bind("192.0.2.1", 0)

    def test_a_free_port(self):
        with lifecycle.bind("127.0.0.1", 0) as listener:
            assert listener.getsockname()[1] > 0


def test_a_port_that_is_lost_between_binding_and_listening(capsys, monkeypatch):
    """Two servers that start together may both bind; the kernel decides when they listen."""
    monkeypatch.setattr(lifecycle, "configure_logging", lambda level: None)
    with lifecycle.bind("127.0.0.1", 0) as faster:
        port = faster.getsockname()[1]

        def build(config):
            faster.listen()
            return FakeEngine(), ("fake",)

        assert lifecycle.run(ServeConfig(port=port), build) == 2
    assert "cannot listen: Address already in use; choose another --port" in capsys.readouterr().err


def test_the_report_is_aligned():
    assert lifecycle.report_lines([("a", "1"), ("bcd", "2")]) == ["a    1", "bcd  2"]
    assert lifecycle.report_lines("x\ny") == ["x", "y"]


def test_a_model_that_is_nowhere_is_the_operators_mistake(capsys, monkeypatch):
    monkeypatch.setattr(lifecycle, "configure_logging", lambda level: None)
    assert lifecycle.run(ServeConfig(model="/nowhere/at/all", port=0)) == 2
    said = capsys.readouterr().err
    assert "'/nowhere/at/all' is neither a directory nor a hub id" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nonsense", "token_budget": 64}, "method 'nonsense' is not known: one of full, rocketkv, "),
        ({"method": "no.such:Method", "token_budget": 64}, "method 'no.such:Method' cannot be made: No module named"),
        ({"token_budget": 16, "headroom": 500}, "lower --headroom"),
        ({"budgets": __file__}, "is no budget profile"),
    ],
)
def test_compression_that_cannot_be_is_told_before_anything_is_compiled(tmp_path, capsys, monkeypatch, settings, said):
    monkeypatch.setattr(lifecycle, "configure_logging", lambda level: None)
    model = tiny.write(tmp_path)
    (model / "model.safetensors").unlink()  # not even the weights are read
    assert lifecycle.run(ServeConfig(model=str(model), port=0, **settings)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kvjax: {model}: ")
    assert said in error
    assert len(error.splitlines()) == 1
