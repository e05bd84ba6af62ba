"""Server process of a benchmark, and a client that records what users would see."""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serving.first_token import free_port, ready

Message = Mapping[str, str]
NAME = "m"


@dataclasses.dataclass(frozen=True)
class Server:
    port: int
    pid: int
    log: pathlib.Path


@contextlib.contextmanager
def serving(model: str | os.PathLike[str], log: pathlib.Path, *flags: str) -> Iterator[Server]:
    """`python -m kvjax.serve` with these flags, once it is ready, as the model `NAME`.

    Raises:
        RuntimeError: it did not start; the message is its log.
    """
    port = free_port()
    command = [sys.executable, "-m", "kvjax.serve", os.fspath(model), "--served-model-name", NAME, "--port", str(port)]
    with log.open("w") as file, subprocess.Popen([*command, *flags], stdout=file, stderr=file) as process:
        try:
            while not ready(port):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield Server(port, process.pid, log)
        finally:
            process.terminate()


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="in the Hugging Face format (default: random weights)")
    parser.add_argument("--host-cache-size", default="1GiB", metavar="SIZE")
    parser.add_argument("--disk-cache-size", default="0", metavar="SIZE", help="0: no disk tier")


def store_flags(args: argparse.Namespace, folder: pathlib.Path) -> tuple[str, ...]:
    """Those of a server with a store; `folder` is for its disk tier."""
    flags = ("--host-cache-size", args.host_cache_size)
    if args.disk_cache_size != "0":
        flags += ("--disk-cache", str(folder), "--disk-cache-size", args.disk_cache_size)
    return flags


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer as its client saw it. Times are of `time.perf_counter`; `cached` tokens were not computed."""

    sent: float
    first: float
    last: float
    text: str
    prompt: int
    generated: int
    cached: int

    @property
    def ttft(self) -> float:
        return self.first - self.sent


class Client:
    """Asks one server, from any thread. A context manager."""

    def __init__(self, server: Server) -> None:
        from openai import OpenAI

        self._url = f"http://127.0.0.1:{server.port}"
        self._client = OpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=3600)
        self.ask([{"role": "user", "content": "hello"}], 1)  # connected, and past whatever happens once
        self._before = self._sources()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, messages: Sequence[Message], count: int) -> Answer:
        """Streams a greedy answer of `count` tokens."""
        text, first, usage = "", None, None
        sent = time.perf_counter()
        stream: Any = self._client.chat.completions.create(
            model=NAME,
            messages=[dict(message) for message in messages],  # type: ignore[arg-type]
            max_tokens=count,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for event in stream:
            usage = event.usage or usage
            chunk = "".join(choice.delta.content or "" for choice in event.choices)
            if chunk and first is None:
                first = time.perf_counter()
            text += chunk
        last = time.perf_counter()
        assert usage is not None, "the server did not say what the request used"
        cached = usage.prompt_tokens_details.cached_tokens
        # an answer of tokens without a text has its first one at its end
        return Answer(sent, first or last, last, text, usage.prompt_tokens, usage.completion_tokens, cached)

    def sources(self) -> dict[str, float]:
        """The source of the KV of all prompts: the share of their tokens by tier, and the share "computed"."""
        tokens = self._sources()
        tokens.subtract(self._before)
        return {source: count / tokens.total() for source, count in sorted(tokens.items()) if count}

    def _sources(self) -> collections.Counter[str]:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=60) as answer:
            lines = re.findall(
                r'^kvjax:prompt_tokens_by_source_total{.*source="(\w+)".*} (\S+)$', answer.read().decode(), re.M
            )
        return collections.Counter({source: int(float(count)) for source, count in lines})


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and the time that one in twenty exceeds."""
    p50, p95 = np.percentile(seconds, (50, 95)).tolist()
    return {"mean": float(np.mean(seconds)), "p50": p50, "p95": p95}


def shown(ttft: Mapping[str, float], sources: Mapping[str, float]) -> str:
    """`TTFT mean 0.21 s, p50 0.20 s, p95 0.30 s | computed 12%, host 88%`."""
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in ttft.items())
    return f"TTFT {times} | " + ", ".join(f"{source} {share:.0%}" for source, share in sources.items())
