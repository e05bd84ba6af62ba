"""Locks of the disk tier: none is waited for without an end or held while data moves, and lost folders come back."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvjax.store import disk, whole_file
from kvjax.store.disk import DiskTier
from kvjax.store.tier import TierError
from kvjax.store.whole_file import TEMPORARY, PartialFile
from tests.store.test_disk import SIZE, held, key, read, taken, write

STOP = """
import fcntl, os, signal, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""
SLACK = 1.0  # that a machine with other work may take to notice a deadline


class Stopped:
    """A process that is stopped while it holds the lock of a folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", STOP, str(folder / "kvjax-kv-2" / "lock")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"locked\n"
        end = time.monotonic() + 10
        while Path(f"/proc/{self.process.pid}/stat").read_text().split()[2] != "T" and time.monotonic() < end:
            time.sleep(0.005)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def open_disk(tmp_path):
    tiers = []

    def opened(blocks: int = 4, **settings) -> DiskTier:
        tiers.append(DiskTier(tmp_path, blocks * SIZE, **{"least_free": 0, **settings}))
        return tiers[-1]

    yield opened
    for tier in tiers:
        tier.close()


@pytest.fixture
def stopped(tmp_path):
    """Starts such processes."""
    processes = []

    def start() -> Stopped:
        processes.append(Stopped(tmp_path))
        return processes[-1]

    yield start
    for process in processes:
        process.end()


def refused(call) -> str:
    """The message of an error "timeout" that comes in time."""
    began = time.monotonic()
    with pytest.raises(TierError) as error:
        call()
    assert error.value.reason == "timeout"
    assert time.monotonic() - began < disk.SECONDS + SLACK
    return str(error.value)


def test_a_process_that_is_stopped_holds_nobody_up(open_disk, stopped):
    tier = open_disk()
    write(tier, 1)
    process = stopped()
    assert str(process.process.pid) in refused(lambda: write(tier, 2))
    refused(lambda: tier.delete(key(1)))
    refused(lambda: tier.pin([key(1)]))
    began = time.monotonic()
    assert read(tier, 1) == bytes([1]) * SIZE
    assert tier.touch([key(1), key(2)]) == [True, False]
    assert held(tier) == [1]
    assert tier.held()["blocks"] == 1
    assert time.monotonic() - began < SLACK, "what takes no space waits for nobody"
    process.end()
    write(tier, 2)
    assert held(tier) == [1, 2]
    stopped()
    began = time.monotonic()
    tier.close()
    assert time.monotonic() - began < disk.SECONDS + SLACK


def test_a_close_beside_a_call_that_waits(open_disk, stopped):
    tier = open_disk()
    stopped()
    outcomes = []

    def call() -> None:
        try:
            write(tier, 1)
        except TierError as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    began = time.monotonic()
    tier.close()
    assert time.monotonic() - began < disk.SECONDS + SLACK
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == 3
    assert set(outcomes) <= {"timeout", "refused"}


def test_a_start_ends_in_time_and_names_who_is_in_the_way(open_disk, stopped, monkeypatch):
    monkeypatch.setattr(disk, "START_SECONDS", 0.3)
    open_disk()
    process = stopped()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        text = refused(open_disk)
        assert f"process {process.process.pid} is stopped" in text
        assert f"kill -CONT {process.process.pid}" in text
    process.end()
    time.sleep(0.1)  # threads that waited let go
    assert len(os.listdir("/proc/self/fd")) <= before
    write(open_disk(), 1)


def test_a_waiter_that_gave_up_lets_go_when_the_lock_comes(open_disk, stopped):
    tier, other = open_disk(), open_disk()
    process = stopped()
    refused(lambda: write(tier, 1))
    os.kill(process.process.pid, signal.SIGCONT)  # it ends, and the thread that waited gets the lock
    for number in range(2, 6):
        write(other, number)
        write(tier, number + 4)
    assert held(other) == [4, 5, 8, 9]


def test_two_writes_move_their_data_at_the_same_time(open_disk, monkeypatch):
    tier, both, fill = open_disk(), threading.Barrier(2), whole_file._fill

    def together(file, blob):
        both.wait(10)
        fill(file, blob)

    monkeypatch.setattr(whole_file, "_fill", together)
    threads = [threading.Thread(target=write, args=(tier, number)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert held(tier) == [1, 2]
    tier.check_integrity()


class Pause:
    """Stops a thread in the middle of its write until it is told to go on."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.go_on, self._fill = threading.Event(), threading.Event(), whole_file._fill
        monkeypatch.setattr(whole_file, "_fill", self.fill)
        self.armed = True

    def fill(self, file, blob):
        if self.armed:
            self.armed = False
            self.begun.set()
            assert self.go_on.wait(20)
        self._fill(file, blob)


@pytest.fixture
def paused(monkeypatch, open_disk, tmp_path):
    """A tier of two blocks, one thread of which is in the middle of its write of block 1."""
    tier, pause = open_disk(2), Pause(monkeypatch)
    thread = threading.Thread(target=write, args=(tier, 1))
    thread.start()
    assert pause.begun.wait(10)
    yield tier
    pause.go_on.set()
    thread.join(20)
    assert read(tier, 1) == bytes([1]) * SIZE
    for each in (tier, open_disk(2)):
        each.check_integrity()


def total(folder: Path) -> int:
    return sum(taken(path) for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def test_a_write_on_its_way_counts_for_every_process(paused, open_disk, tmp_path):
    other = open_disk(2)  # it sweeps what writers have left
    for tier in (other, paused):
        for number in range(2, 6):
            write(tier, number)
            assert total(tmp_path) <= 2 * SIZE
        assert held(tier) == [5]
    with pytest.raises(TierError) as error:
        write(other, 9, size=2 * SIZE)
    assert error.value.reason == "full"
    assert held(other) == [5], "what would not help is not thrown out"


def test_a_write_on_its_way_does_not_hold_up_anything(paused, open_disk):
    began = time.monotonic()
    write(paused, 2)
    paused.delete(key(2))
    assert paused.held()["used_bytes"] == SIZE
    assert not paused.contains(key(1))
    open_disk(2)
    assert time.monotonic() - began < SLACK


def test_an_ancestor_of_a_write_on_its_way_stays(open_disk, monkeypatch):
    tier = open_disk(2)
    write(tier, 1)
    pause = Pause(monkeypatch)
    thread = threading.Thread(target=lambda: tier.write(key(2), memoryview(bytes([2]) * SIZE), key(1)))
    thread.start()
    assert pause.begun.wait(10)
    with pytest.raises(TierError) as error:
        write(tier, 3)
    assert error.value.reason == "full"
    pause.go_on.set()
    thread.join(20)
    assert held(tier) == [1, 2]
    write(tier, 3)
    assert held(tier) == [1, 3]


def test_the_file_of_a_writer_that_died_is_swept_and_that_of_one_that_lives_is_not(open_disk, tmp_path):
    open_disk()
    path = tmp_path / "kvjax-kv-2" / key(7)[:2] / key(7)
    (path.parent / f"{path.name}.1.0{TEMPORARY}").write_bytes(bytes(SIZE))
    with PartialFile(path, SIZE) as alive:
        tier = open_disk()
        assert alive.temporary.exists()
        assert tier.used_bytes == SIZE
        alive.fill(memoryview(bytes(SIZE)), sync=False)
        alive.commit()
    assert held(tier) == [7]


def test_a_lock_file_that_somebody_replaced_is_noticed(open_disk, tmp_path):
    tier, path = open_disk(), tmp_path / "kvjax-kv-2" / "lock"
    write(tier, 1)
    path.unlink()
    other = open_disk()
    with other._alone():
        refused(lambda: write(tier, 2))
    write(tier, 2)
    path.unlink()
    path.touch()
    write(tier, 3)
    with tier._alone():
        refused(lambda: write(other, 4))
    assert held(tier) == [1, 2, 3]


@pytest.mark.parametrize("folder", [".", "kvjax-kv-2", f"kvjax-kv-2/{key(1)[:2]}"])
def test_a_folder_that_is_removed_is_made_again(open_disk, tmp_path, folder):
    tier = open_disk(blocks=4, sync=True)
    write(tier, 1, 2)
    shutil.rmtree(tmp_path / folder)
    assert read(tier, 1) is None
    assert not tier.contains(key(1))
    assert 1 not in held(tier)
    assert tier.touch([key(1)]) == [False]
    write(tier, 1, 5)
    tier.check_integrity()
    assert {1, 5} <= set(held(tier))
    assert tier.used_bytes == len(held(tier)) * SIZE
    assert len(tier) == len(held(tier))
    tier.pin([key(5)])
    write(tier, 6, 7, 8, 9)
    assert 5 in held(tier)


def test_a_folder_in_the_place_of_a_file(open_disk, tmp_path):
    tier = open_disk(blocks=8)
    write(tier, 1)
    path = tmp_path / "kvjax-kv-2" / key(2)[:2] / key(2)
    path.mkdir()
    (path / "notes.txt").write_bytes(bytes(SIZE))
    (tmp_path / "kvjax-kv-2" / key(3)[:2] / (key(3) + TEMPORARY)).mkdir()
    for each in (tier, open_disk(blocks=8)):
        write(each, 1)
        assert not {2, 3} & set(held(each))
        assert read(each, 2) is None
        assert each.contains_many([key(1), key(2)] * 10) == [True, False] * 10
        assert not each.contains(key(2))
        each.delete(key(2))
        assert each.touch([key(2)]) == [False]
        write(each, 4, 5, 6, 7, 8)
        assert total(tmp_path) <= 8 * SIZE
        each.check_integrity()
    write(tier, 2)
    assert read(tier, 2) == bytes([2]) * SIZE
    assert [path.stat().st_size for path in tmp_path.rglob("notes.txt")] == [SIZE], "it is not ours to remove"
    tier.check_integrity()


def test_a_fifo_in_the_place_of_a_file_keeps_nobody_waiting(open_disk, tmp_path):
    tier = open_disk()
    os.mkfifo(tmp_path / "kvjax-kv-2" / key(2)[:2] / key(2))
    with pytest.raises(TierError) as error:
        read(tier, 2)
    assert error.value.reason == "length"
    tier.delete(key(2))
    write(tier, 2)
    assert read(tier, 2) == bytes([2]) * SIZE


def test_a_start_on_a_full_file_system_says_how_much_can_be_used(open_disk, caplog, monkeypatch):
    write(open_disk(), 1)
    open_disk(least_free=1)
    assert not caplog.records
    open_disk(least_free=1 << 60)
    assert "of the limit of 16.0 KiB only 4.0 KiB can be used" in caplog.text


def test_listings_do_not_look_at_files_that_are_known(open_disk, tmp_path, monkeypatch):
    """A write costs a look at the folders, whatever is in them."""
    counts = []

    def counted(call):
        return lambda *args, **how: (calls.append(args), call(*args, **how))[1]

    calls: list[tuple] = []
    for blocks in (50, 2000):
        tier = open_disk(blocks=4000)
        for number in range(blocks):
            (tmp_path / "kvjax-kv-2" / key(number)[:2] / key(number)).write_bytes(b"x")
        time.sleep(0.2)  # folders that changed just now are listed once more
        write(tier, 3000 + blocks)
        assert tier._parents.wait(20.0)
        calls.clear()
        with monkeypatch.context() as patch:
            for name in ("stat", "lstat", "scandir", "open"):
                patch.setattr(os, name, counted(getattr(os, name)))
            write(tier, 4000 + blocks)
        counts.append(len(calls))
        tier.check_integrity()
    assert counts[1] <= counts[0] + 3, counts
