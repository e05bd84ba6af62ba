"""The store as a user meets it: servers that are stopped, killed, started anew or share a folder; broken remotes."""

import contextlib
import functools
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from kvjax.serve import lifecycle
from kvjax.serve.__main__ import main
from tests.end_to_end.server_process import ServerProcess

PROMPT = (
    "The quick fox is here. " * 150 + "The code for apple is 4719.\nWhat is the code for apple?\nThe code for apple is"
)


def server(tmp_path, name: str, *flags: str) -> ServerProcess:
    small = ("--max-model-len", "2k", "--max-num-seqs", "2", "--host-cache-size", "64MiB")
    compiled = tmp_path.parent / "compiled"  # by the first of these servers, for all of them
    return ServerProcess(tmp_path / name, *small, "--compile-cache", str(compiled), *flags)


def disk(tmp_path) -> tuple[str, ...]:
    return "--disk-cache", str(tmp_path / "kv"), "--disk-cache-size", "1GiB", "--prefetch-policy", "wait_complete"


def remote(tmp_path, url: str) -> ServerProcess:
    return server(tmp_path, "log", "--remote-cache", url)


def ask(url: str, prompt: str = PROMPT, **fields) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were not computed."""
    body = {"model": "kvjax-small", "prompt": prompt, "max_tokens": 24, "temperature": 0, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer.json()["choices"][0]["text"], found


def metric(url: str, name: str, *labels: str) -> float:
    """The sum of a metric's samples that carry all of these labels."""
    lines = re.findall(rf"^kvjax:{name}{{(.*)}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return sum(float(value) for carried, value in lines if all(label in carried for label in labels))


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_caches_are_back_after_a_stop_and_after_a_kill(tmp_path):
    with server(tmp_path, "first", *disk(tmp_path)) as process:
        url = process.ready()
        cold, found = ask(url)
        assert found == 0
        wait_until(lambda: metric(url, "store_written_blocks_total", 'tier="host"'))
        warm, found = ask(url)
        assert warm == cold
        assert found >= 512
        assert f"host {found:,} + computed" in process.log
        assert process.terminate() == 0
        assert "every block is stored" in process.log
    with server(tmp_path, "second", *disk(tmp_path)) as process:
        url = process.ready()
        assert ask(url) == (cold, found)
        assert f"disk {found:,} + computed" in process.log
        assert ask(url, cache_salt="somebody else") == (cold, 0)
        process.kill()
    with server(tmp_path, "third", *disk(tmp_path)) as process:
        url = process.ready()
        assert ask(url) == (cold, found)
        assert metric(url, "store_errors_total") == 0
        assert process.terminate() == 0


def test_with_the_flag_a_next_turn_finds_the_answer(tmp_path):
    """Prompts are token ids and one token alone is said, so that nothing is tokenised anew."""
    said, prompt = 300, [400 + index % 97 for index in range(900)]
    with server(tmp_path, "log", "--store-generated", "yes") as process:
        url = process.ready()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            create = functools.partial(client.completions.create, model="kvjax-small", temperature=0)
            first = create(prompt=prompt, max_tokens=140, logit_bias={str(said): 100})
            wait_until(lambda: metric(url, "store_written_blocks_total", 'tier="host"') >= 5)  # with a tail
            again = create(prompt=[*prompt, *[said] * 140, *[500] * 60], max_tokens=1)
        found = [each.usage.prompt_tokens_details.cached_tokens for each in (first, again)]
        assert found == [0, 1024]
        assert "host 1,024 + computed 76" in process.log
        assert process.terminate() == 0


def test_two_servers_share_a_folder(tmp_path):
    with server(tmp_path, "one", *disk(tmp_path)) as one, server(tmp_path, "other", *disk(tmp_path)) as other:
        first, second = one.ready(), other.ready()
        cold, _ = ask(first)
        wait_until(lambda: metric(first, "store_written_blocks_total", 'tier="disk"') >= 2)
        time.sleep(0.5)  # and the others
        warm, found = ask(second)
        assert (warm, found >= 512) == (cold, True)
        assert one.terminate() == other.terminate() == 0


@contextlib.contextmanager
def stalling_port():
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held, stop = [], threading.Event()

        def accept() -> None:
            listener.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    held.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join()
            for connection in held:
                connection.close()


@pytest.mark.parametrize("scheme", [pytest.param("redis", marks=pytest.mark.slow), "http"])
def test_a_remote_that_stalls_costs_a_recompute_within_the_policys_time(tmp_path, scheme):
    with (
        stalling_port() as port,
        server(tmp_path, "log", "--remote-cache", f"{scheme}://127.0.0.1:{port}/0") as process,
    ):
        url = process.ready()
        began = time.monotonic()
        cold, found = ask(url)
        assert found == 0
        assert time.monotonic() - began < 10
        wait_until(lambda: metric(url, "store_errors_total", 'tier="remote"', 'reason="timeout"'))
        wait_until(lambda: metric(url, "store_written_blocks_total", 'tier="host"'))
        assert ask(url)[0] == cold
        process.terminate()


@pytest.mark.slow  # twenty seconds; what a tier does then has quick tests of its own
def test_a_remote_that_refuses_is_left_alone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with remote(tmp_path, f"redis://127.0.0.1:{port}/0") as process:
        url = process.ready()
        for number in range(4):
            began = time.monotonic()
            ask(url, f"{number} {PROMPT}")
            assert time.monotonic() - began < 10
        wait_until(lambda: metric(url, "store_breaker_open", 'tier="remote"'))
        process.terminate()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--remote-cache", "ftp://host"), "no scheme of a tier"),
        (("--disk-cache", "/dev/null/kv", "--disk-cache-size", "1GiB"), "Not a directory"),
        (("--host-cache-size", "1MiB"), "hold no chunk of 512 tokens"),
    ],
)
def test_a_store_that_cannot_be_opened_ends_the_start_with_a_sentence(monkeypatch, capfd, caplog, flags, says):
    monkeypatch.setattr(lifecycle, "configure_logging", lambda level: None)  # what it sets holds for later tests
    assert main(["--port", "0", "--compile-cache", "none", *flags]) != 0
    log = caplog.text + "".join(capfd.readouterr())
    assert says in log
    assert "Traceback" not in log
