"""A server that is stopped in the middle of an answer, and the next one, from which the same client gets all of it."""

import json
import re
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.server_process import ServerProcess

TOKENS = 700
GREEDY = {"prompt": "def fibonacci(n):\n", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
SAMPLED = GREEDY | {"prompt": "Once upon a time", "temperature": 0.8, "seed": 11, "cache_salt": "mine"}


def server(tmp_path: Path, name: str) -> ServerProcess:
    flags = ("--max-model-len", "1k", "--max-num-seqs", "2", "--host-cache-size", "0", "--token-budget", "128")
    retained = ("--compile-cache", str(tmp_path / "compiled"), "--session-dir", str(tmp_path / "suspended"))
    return ServerProcess(tmp_path / name, *flags, "--shutdown-timeout", "0", *retained)


def events(answer: httpx.Response):
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def ask(url: str, body: dict) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    assert answer.json()["usage"]["completion_tokens"] == TOKENS
    return answer.json()["choices"][0]["text"]


def suspended(url: str) -> float:
    return float(
        re.search(r"^kvjax:num_requests_suspended{.*} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)[1]
    )


@pytest.mark.slow  # two servers start, each of which compiles, and answer long enough to be stopped halfway
def test_an_answer_goes_on_after_a_restart(tmp_path):
    heard = ["", ""]
    with server(tmp_path, "first") as process:
        url = process.ready()
        with (
            httpx.stream("POST", f"{url}/v1/completions", json=GREEDY | {"stream": True}, timeout=120) as one,
            httpx.stream("POST", f"{url}/v1/completions", json=SAMPLED | {"stream": True}, timeout=120) as other,
        ):
            streams = [events(one), events(other)]
            for number, stream in enumerate(streams):
                for _ in range(3):
                    heard[number] += next(stream)["choices"][0]["text"]
            assert process.terminate() == 0
            for number, stream in enumerate(streams):
                *texts, last = stream
                assert last["error"]["code"] == "draining"
                heard[number] += "".join(event["choices"][0]["text"] for event in texts)
        assert re.search(r"suspended 2 conversations in \S+suspended, ", process.log)
    with server(tmp_path, "second") as process:
        url = process.ready()
        assert "suspended      2 conversations are back" in process.log
        assert suspended(url) == 2
        going_on = [ask(url, GREEDY), ask(url, SAMPLED)]
        assert suspended(url) == 0
        assert len(re.findall(r"prompt \d+ tok: suspended \d+ .* resumed after \d+ tokens", process.log)) == 2
        assert all(answer.startswith(beginning) for answer, beginning in zip(going_on, heard, strict=True))
        assert all(heard)
        assert [ask(url, GREEDY), ask(url, SAMPLED)] == going_on  # without an interruption
        assert process.log.count("resumed after") == 2
        assert "WARNING" not in process.log
        assert process.terminate() == 0
    assert not list((tmp_path / "suspended").iterdir())
