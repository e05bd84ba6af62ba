"""The end of a server whose tiers hang: within its shutdown timeout and two seconds, or at once with a second signal.

A disk tier hangs when another process holds the lock of its folder and is stopped, as by Ctrl-Z or a debugger.
"""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kvjax.engine.kv.executor import QUEUED, BackgroundExecutor
from kvjax.engine.kv.prefix_cache import PrefixCache
from tests.end_to_end.server_process import ServerProcess
from tests.store.chains import NAMESPACE, names_of, save, store_of
from tests.store.memory_tier import MemoryTier

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
SLOW = pytest.mark.slow  # a server of its own, which compiles for half a minute


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


@SLOW
def test_a_disk_tier_whose_lock_is_held_by_a_stopped_process(tmp_path):
    with server(tmp_path) as process:
        url = process.ready()
        with stopped_holder(tmp_path / "kv"):
            httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, timeout=60).raise_for_status()
            seconds, status = seconds_to_end(process, signal.SIGTERM)
    assert status == 0, process.log
    assert seconds < TIMEOUT + 2, f"{seconds:.1f} s:\n{process.log}"
    assert "some blocks could not be stored in time" in process.log
    assert "Traceback" not in process.log


@SLOW
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


@SLOW
def test_a_held_lock_ends_the_start_with_a_sentence(tmp_path):
    with stopped_holder(tmp_path / "kv") as pid, server(tmp_path) as process:
        assert process.wait(60) == 2
    sentence = re.search(r"^kvjax: .*$", process.log, re.MULTILINE)
    assert sentence is not None, process.log
    assert f"process {pid} is stopped and has (kill -CONT {pid} continues it) held the lock for 5 s" in sentence[0]
    assert sentence[0].endswith("end it, or use another folder")
    assert "Traceback" not in process.log


class HangingTier(MemoryTier):
    """Every call hangs until `released` is set."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.released = threading.Event()

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        self.released.wait()

    def contains(self, key: str) -> bool:
        return self.released.wait()

    def close(self) -> None:
        self.released.wait()


class ClosingTier(MemoryTier):
    closed_at = 0.0

    def close(self) -> None:
        super().close()
        self.closed_at = time.monotonic()


@pytest.fixture
def hanging():
    tiers = [HangingTier("first"), HangingTier("second")]
    yield tiers
    for tier in tiers:
        tier.released.set()


def test_tiers_that_hang_cost_a_store_its_timeout_and_other_tiers_nothing(hanging):
    healthy = ClosingTier()
    store = store_of(*hanging, healthy)
    save(store, names_of(3))
    assert not store.flush(0.1)
    began = time.monotonic()
    assert not store.close(0.5)
    assert time.monotonic() - began < 1.0
    assert 0 < healthy.closed_at - began < 0.4  # beside the others, not behind them


def test_a_store_whose_tiers_end_is_closed_at_once():
    store = store_of(ClosingTier(), ClosingTier())
    save(store, names_of(3))
    began = time.monotonic()
    assert store.close(30.0)
    assert time.monotonic() - began < 5.0


def test_a_task_that_hangs_costs_an_executor_its_timeout():
    executor, released = BackgroundExecutor(), threading.Event()
    executor.put(released.wait)
    assert not executor.settle(0.05)
    for _ in range(QUEUED - 2):  # `settle` has taken a place as well
        executor.put(lambda: None)
    assert not executor.settle(0.05)
    assert not executor.close(0.05)
    released.set()
    assert executor.close(10.0)


def test_a_prefix_cache_closes_within_its_timeout_whatever_hangs(hanging):
    cache, released = PrefixCache(store_of(*hanging), NAMESPACE, 256, 0), threading.Event()
    save(cache.store, names_of(3))
    cache.executor.put(released.wait)
    began = time.monotonic()
    assert not cache.flush(0.1)
    assert not cache.close(0.3)
    assert time.monotonic() - began < 1.5
    released.set()
