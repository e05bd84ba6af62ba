"""The tier in Mooncake, against a real master over TCP. Nightly, because it needs Debian packages that CI has not."""

import contextlib
import ctypes.util
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvjax.store import mooncake_tier
from kvjax.store.guard import Guarded
from kvjax.store.tier import Tier, TierError
from kvjax.store.url import open_tier
from tests.store.contract import SIZE, TierContract, blob, fill, key, read
from tests.store.redis_server import free_port
from tests.store.test_breaker import Clock

LIBRARIES = {"ibverbs": "libibverbs1", "rdmacm": "librdmacm1", "numa": "libnuma1", "uring": "liburing2"}
LEASE = 0.05  # seconds
MEGABYTE = 1 << 20

needs_mooncake = pytest.mark.skipif(
    importlib.util.find_spec("mooncake") is None, reason="no mooncake: the extra `mooncake` is not installed"
)


class Master:
    """A real master on a port of its own, which can be killed, stopped and started again."""

    def __init__(self, folder: Path) -> None:
        missing = [package for name, package in LIBRARIES.items() if ctypes.util.find_library(name) is None]
        if missing:
            pytest.skip(f"mooncake_master needs Debian's packages: apt-get install {' '.join(missing)}")
        self.binary = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        self.folder = folder
        self.port, self.metrics = free_port(), free_port()
        self.process: subprocess.Popen | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}?buffer={16 * MEGABYTE}"

    def start(self) -> None:
        command = [self.binary, f"--rpc_port={self.port}", f"--metrics_port={self.metrics}", "--rpc_address=127.0.0.1"]
        command += ["--rpc_interface=lo", f"--default_kv_lease_ttl={int(LEASE * 1000)}"]
        with (self.folder / "master.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 20
        while time.monotonic() < end and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"mooncake_master does not start:\n{(self.folder / 'master.log').read_text()}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def shared_master(tmp_path_factory):
    master = Master(tmp_path_factory.mktemp("mooncake"))
    yield master
    master.kill()


@pytest.fixture
def master(tmp_path):
    master = Master(tmp_path)
    yield master
    master.kill()


@pytest.fixture(scope="module")
def shared(shared_master):
    """A client takes two seconds to say goodbye, so the cases share one, which each clears up."""
    tier = open_tier(f"{shared_master.url}&segment={64 * MEGABYTE}", timeout=20.0)
    yield tier
    tier.close()


def eventually(tier: Tier, seconds: float = 20.0) -> Tier:
    """Connected: the first calls may come too early."""
    end = time.monotonic() + seconds
    while True:
        try:
            tier.contains(key(0))
            return tier
        except TierError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def heals(tier: Tier) -> bool:
    """Whether it works again: until the master notices, it may send us to the memory of a client that is gone."""
    for n in range(5, 1000):
        with contextlib.suppress(TierError):
            tier.write(key(n), blob(n))
            return read(tier, n) == bytes(blob(n))
        time.sleep(0.05)
    return False


@needs_mooncake
@pytest.mark.clients
class TestMooncake(TierContract):
    can_scan = False
    lease = 2 * LEASE

    @pytest.fixture
    def tier(self, shared, shared_master, opened, request):
        if "after_close" in request.node.name:
            return opened(f"{shared_master.url}&segment={16 * MEGABYTE}", timeout=20.0)
        time.sleep(self.lease)
        for n in range(200):
            shared.delete(key(n))
        return fill(shared)

    def test_a_client_without_memory_of_its_own(self, tier, shared_master, opened):
        other = opened(shared_master.url, timeout=20.0)
        assert read(other, 1) == bytes(blob(1))
        other.write(key(5), blob(5))
        assert read(tier, 5) == bytes(blob(5))

    def test_an_object_that_was_just_read_is_not_deleted(self, tier):
        assert read(tier, 1) == bytes(blob(1))
        with pytest.raises(TierError) as error:
            tier.delete(key(1))
        assert error.value.reason == "refused"
        time.sleep(self.lease)
        tier.delete(key(1))

    def test_full(self, tier):
        with pytest.raises(TierError) as error:
            [tier.write(key(100 + n), blob(n, 4 * MEGABYTE)) for n in range(20)]
        assert error.value.reason == "full"

    def test_an_object_larger_than_the_buffer(self, tier):
        with pytest.raises(TierError) as error:
            tier.write(key(7), blob(7, 20 * MEGABYTE))
        assert error.value.reason == "refused"


@needs_mooncake
@pytest.mark.clients
def test_a_master_that_dies_and_comes_back(master, opened):
    clock = Clock()
    tier = eventually(opened(f"{master.url}&segment={16 * MEGABYTE}", timeout=0.5))
    guard = Guarded(fill(tier), 1.0, attempts=1, failures=2, pause=5.0, clock=clock)
    assert read(guard, 1) == bytes(blob(1))
    master.kill()
    while guard.state == "closed":
        begun = time.monotonic()
        with pytest.raises(TierError):
            read(guard, 1)
        assert time.monotonic() - begun < 2.5
    master.start()
    end = time.monotonic() + 40
    while guard.state != "closed" and time.monotonic() < end:
        clock.now += 5
        try:
            assert read(guard, 1) is None, "its memory went with the client that was given up"
        except TierError:
            time.sleep(0.05)
    assert guard.state == "closed"
    tier.timeout = 20.0
    assert heals(tier)


@needs_mooncake
@pytest.mark.clients
def test_a_master_that_hangs_holds_up_nobody(master, opened):
    """Where Mooncake's client would hold Python's lock, so that no deadline in this process could help."""
    tier = opened(master.url, timeout=0.2)
    master.process.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        for _ in range(3):
            with pytest.raises(TierError) as error:
                read(tier, 1)
            assert error.value.reason == "timeout"
        assert time.monotonic() - begun < 3.0
        begun = time.monotonic()
        tier.close()
        assert time.monotonic() - begun < 3.0
    finally:
        master.process.send_signal(signal.SIGCONT)


@needs_mooncake
@pytest.mark.clients
def test_a_process_that_dies_is_started_again(master, opened):
    tier = opened(f"{master.url}&segment={16 * MEGABYTE}", timeout=20.0)
    fill(tier)
    tier._process.kill()
    with pytest.raises(TierError) as error:
        tier.contains(key(1))
    assert error.value.reason == "io"
    assert heals(tier)


# The rest needs no Mooncake: a process that stands in for the one with the client.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A tier whose process runs `source`, with the frames of the real one."""
    tiers = []

    def start(source: str, timeout: float = 20.0) -> mooncake_tier.MooncakeTier:
        script = tmp_path / "stand_in.py"
        script.write_text(
            f"import importlib.util, socket, sys, time\nfar_path = {mooncake_tier.far.__file__!r}\n{source}"
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        tiers.append(mooncake_tier.MooncakeTier("nowhere", 1, timeout=timeout))
        monkeypatch.setattr(mooncake_tier, "SCRIPT", script)
        return tiers[-1]

    yield start
    for tier in tiers:
        tier.close()


FAR = """
spec = importlib.util.spec_from_file_location("far", far_path)
far = importlib.util.module_from_spec(spec)
spec.loader.exec_module(far)

class Store:
    def __init__(self):
        self.objects = {}
    def put(self, name, blob):
        return -705 if name in self.objects else self.objects.update({name: bytes(blob)}) or 0
    def is_exist(self, name):
        return int(name in self.objects)
    def remove(self, name):
        return 0 if self.objects.pop(name, None) is not None else -704
    def get_buffer(self, name):
        return self.objects.get(name)
    def get_size(self, name):
        return len(self.objects[name]) if name in self.objects else -704
    def close(self):
        pass
"""


class TestStandIn(TierContract):
    """The contract, with a dictionary in place of Mooncake's client."""

    can_scan = False

    @pytest.fixture
    def tier(self, stand_in) -> Tier:
        return fill(stand_in(FAR + "far.connect = lambda options: Store()\nfar.main()"))


@pytest.mark.parametrize(
    ("source", "reason", "says"),
    [
        ("time.sleep(60)", "timeout", "still connecting"),
        ("sys.exit(3)", "io", "EOFError"),
        (FAR + "far.connect = lambda options: 1 / 0\nfar.main()", "io", "ZeroDivisionError"),
        (FAR + "Store.is_exist = lambda *_: -900\nfar.connect = lambda _: Store()\nfar.main()", "io", "error -900"),
        (
            FAR + "Store.is_exist = lambda *_: time.sleep(60)\nfar.connect = lambda _: Store()\nfar.main()",
            "timeout",
            "",
        ),
        (
            FAR + "Store.is_exist = lambda *_: sys.exit(1)\nfar.connect = lambda _: Store()\nfar.main()",
            "io",
            "EOFError",
        ),
        (
            FAR + "far.answer = lambda *_: (1, b'more')\nfar.connect = lambda _: Store()\nfar.main()",
            "io",
            "nobody asked",
        ),
    ],
)
def test_a_process_that_fails(stand_in, source, reason, says):
    tier = stand_in(source)
    if reason == "timeout":
        tier.timeout = 0.6
    for _ in range(2):
        with pytest.raises(TierError) as error:
            tier.contains(key(1))
        assert error.value.reason == reason or "still connecting" in str(error.value)
        if error.value.reason == reason:
            assert says in str(error.value)


BATCH = """
calls = []
def batch(self, names):
    calls.append(names)
    return [-900 if len(calls) > 1 else int(name in self.objects) for name in names]
Store.batch_is_exist = batch
Store.is_exist = lambda *_: -900
far.connect = lambda options: Store()
far.main()
"""


def test_many_keys_are_one_question(stand_in):
    tier = fill(stand_in(FAR + BATCH))
    assert tier.contains_many([key(n) for n in (2, 7, 0)]) == [True, False, True]
    with pytest.raises(TierError, match="error -900"):
        tier.touch([key(n) for n in (2, 7, 0)])


def test_the_process_ends_with_us(stand_in):
    tier = stand_in(FAR + "far.connect = lambda options: Store()\nfar.main()")
    fill(tier)
    process = tier._process
    tier.close()
    assert process.returncode == 0
    assert SIZE
