"""The end of a server whose tiers hang: within its shutdown timeout and two seconds, or at once with a second signal.

A disk tier hangs when another process holds the lock of its folder and is stopped, as by Ctrl-Z or a debugger.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from kvjax.engine.kv.executor import QUEUED, BackgroundExecutor
from kvjax.serve.config import ServeConfig
from kvjax.serve.lifecycle import Server
from kvjax.store.block import BlockLayout
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BlockKey, Namespace
from kvjax.store.store import KVStore
from tests.end_to_end.server_process import ServerProcess
from tests.store.test_store import DictTier

HOLDER = """
import fcntl, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
signal.pause()
"""
PROMPT = "The quick fox is here. " * 150
TIMEOUT = 1.0
AT_ONCE = 1.0


@contextlib.contextmanager
def stopped_holder(root: Path) -> Iterator[int]:
    """A stopped process that holds the lock of a disk tier's folder."""
    (root / "kvjax-kv-2").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLDER, str(root / "kvjax-kv-2" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            holder.send_signal(signal.SIGSTOP)
            yield holder.pid
        finally:
            holder.kill()


def server(tmp_path: Path, *flags: str) -> ServerProcess:
    small = ("--max-model-len", "2k", "--max-num-seqs", "2", "--host-cache-size", "64MiB")
    tier = ("--tier", f"disk://{tmp_path}/kv?size=1GiB", "--shutdown-timeout", str(TIMEOUT))
    compiled = tmp_path.parent / "compiled"  # by the first of these servers, for all of them
    return ServerProcess(tmp_path / "log", *small, *tier, "--compile-cache", str(compiled), *flags)


def seconds_to_end(process: ServerProcess, *signals: signal.Signals, pause: float = 0.0) -> tuple[float, int]:
    """Seconds from the last of these signals to the end of a process, and its exit status."""
    for index, number in enumerate(signals):
        time.sleep(pause if index else 0.0)
        began = time.monotonic()
        process.send(number)
    status = process.wait(30)
    return time.monotonic() - began, status


def test_a_disk_tier_whose_lock_is_held_by_a_stopped_process(tmp_path):
    with server(tmp_path) as process:
        url = process.ready()
        with stopped_holder(tmp_path / "kv"):
            httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, timeout=60).raise_for_status()
            seconds, status = seconds_to_end(process, signal.SIGTERM)
    assert status == 0, process.log
    assert seconds < TIMEOUT + 2, process.log
    assert "some blocks could not be stored in time" in process.log
    assert "Traceback" not in process.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_whose_tier_hangs_at_once(tmp_path, number):
    with server(tmp_path, "--shutdown-timeout", "60") as process:
        url = process.ready()
        with stopped_holder(tmp_path / "kv"):
            httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, timeout=60).raise_for_status()
            seconds, status = seconds_to_end(process, signal.SIGTERM, number, pause=0.5)
    assert status == 128 + number, process.log
    assert seconds < AT_ONCE
    assert f"second {number.name}, leaving now" in process.log


def test_a_held_lock_ends_the_start_with_a_sentence(tmp_path):
    with stopped_holder(tmp_path / "kv") as pid, server(tmp_path) as process:
        assert process.wait(60) == 2
    sentence = re.search(r"^kvjax: .*$", process.log, re.MULTILINE)
    assert sentence is not None, process.log
    assert f"process {pid} is stopped and has (kill -CONT {pid} continues it) held the lock for 5 s" in sentence[0]
    assert sentence[0].endswith("end it, or use another folder")
    assert "Traceback" not in process.log


class HangingEngine:
    """Runs, and neither drains nor closes: what a device that hangs looks like."""
