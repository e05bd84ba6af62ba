"""The disk tier: whole files or none, never more bytes than allowed, several owners, and any rubbish in its folder."""

import errno
import multiprocessing
import os
import stat
import time

import pytest

from kvjax.store.disk import DiskTier
from kvjax.store.tier import TierError
from kvjax.store.whole_file import TEMPORARY
from tests.store.contract import TierContract
from tests.store.contract import fill as filled

SIZE = 4096


def key(number: int) -> str:
    return f"{number % 256:02x}{number:062x}"


def write(tier: DiskTier, *numbers: int, size: int = SIZE) -> None:
    for number in numbers:
        tier.write(key(number), memoryview(bytes([number % 256]) * size))


def held(tier: DiskTier) -> list[int]:
    return sorted(int(stored.key[2:], 16) for stored in tier.scan())


def read(tier: DiskTier, number: int, size: int = SIZE) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if tier.read(key(number), memoryview(buffer)) else None


def taken(path) -> int:
    """Bytes of a file, in whole pages."""
    stat = path.lstat()
    return max(stat.st_blocks * 512, -(-stat.st_size // 4096) * 4096)


@pytest.fixture
def open_disk(tmp_path):
    tiers = []

    def opened(blocks: int = 4, **settings) -> DiskTier:
        tiers.append(DiskTier(tmp_path, blocks * SIZE, **{"least_free": 0, **settings}))
        return tiers[-1]

    yield opened
    for tier in tiers:
        tier.check_integrity()
        tier.close()


class TestContract(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        return filled(DiskTier(tmp_path, 1 << 30, least_free=0))


def test_what_was_written_is_read_again_by_the_next_process(open_disk):
    first = open_disk()
    write(first, 1, 2)
    second = open_disk()
    assert read(second, 1) == bytes([1]) * SIZE
    assert read(second, 3) is None
    assert held(second) == [1, 2]
    assert len(second) == 2


def test_the_cap_is_never_passed_and_the_oldest_leave(open_disk):
    tier = open_disk(blocks=3)
    for number in range(10):
        write(tier, number)
        assert tier.used_bytes <= 3 * SIZE
    assert held(tier) == [7, 8, 9]
    assert read(tier, 7)
    write(tier, 10)
    assert held(tier) == [7, 9, 10]
    assert tier.evictions == 8


def test_what_can_never_fit_is_refused_and_throws_nothing_out_for_good(open_disk):
    tier = open_disk(blocks=2)
    write(tier, 1, 2)
    with pytest.raises(TierError, match="no room") as error:
        write(tier, 3, size=3 * SIZE)
    assert error.value.reason == "full"
    assert held(tier) == [1, 2]


def test_a_start_with_less_room_throws_out_what_is_too_much(open_disk):
    write(open_disk(blocks=4), 1, 2, 3, 4)
    assert held(open_disk(blocks=2)) == [3, 4]


def test_a_start_knows_who_was_used_last(open_disk, tmp_path):
    first = open_disk(blocks=3)
    write(first, 1, 2, 3)
    for age, number in ((300, 2), (200, 3), (100, 1)):
        path = tmp_path / "kvjax-kv-2" / key(number)[:2] / key(number)
        os.utime(path, (time.time() - age,) * 2)
    second = open_disk(blocks=3)
    assert read(second, 2)
    write(second, 4)
    assert held(second) == [1, 2, 4], "3 is the oldest: 2 was read since"


def test_what_was_there_before_counts_and_is_left_alone(open_disk, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_bytes(bytes(SIZE))
    foreign = sum(taken(path) for path in tmp_path.rglob("*"))
    tier = DiskTier(tmp_path, foreign + 2 * SIZE, least_free=0)
    assert tier.used_bytes == foreign
    write(tier, 1, 2, 3)
    assert held(tier) == [2, 3]
    assert tier.used_bytes <= foreign + 2 * SIZE
    assert (tmp_path / "mine" / "notes.txt").exists()
    tier.check_integrity()


def test_temporary_files_count_and_are_swept_at_the_start(open_disk, tmp_path):
    write(open_disk(), 1)
    left = tmp_path / "kvjax-kv-2" / "07" / (key(7) + TEMPORARY)
    left.write_bytes(bytes(3 * SIZE))
    tier = open_disk(blocks=5)
    assert not left.exists()
    assert held(tier) == [1]
    write(tier, 7)
    left.write_bytes(bytes(2 * SIZE))
    write(tier, 8)
    assert held(tier) == [1, 7, 8]
    assert left.exists(), "there is room for it"
    assert tier.used_bytes == 5 * SIZE
    write(tier, 9)
    assert held(tier) == [1, 7, 8, 9], "a dead writer's file makes room before any block does"
    assert not left.exists()


def test_files_of_other_names_are_never_blocks(open_disk, tmp_path):
    tier = open_disk()
    (tmp_path / "kvjax-kv-2" / "00" / "README").write_bytes(b"hello")
    (tmp_path / "kvjax-kv-2" / "00" / ("A" * 64)).write_bytes(b"hello")
    (tmp_path / "kvjax-kv-2" / "stray").mkdir()
    write(tier, 1, 2)
    assert held(tier) == [1, 2]


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1])
def test_a_file_of_another_length_is_an_error(open_disk, tmp_path, size):
    tier = open_disk()
    write(tier, 1)
    (tmp_path / "kvjax-kv-2" / key(1)[:2] / key(1)).write_bytes(bytes(size))
    with pytest.raises(TierError) as error:
        read(tier, 1)
    assert error.value.reason == "length"
    tier.delete(key(1))
    tier.delete(key(1))
    assert read(tier, 1) is None


def test_two_owners_of_one_folder_see_each_others_blocks_and_keep_one_cap(open_disk):
    one, other = open_disk(blocks=4), open_disk(blocks=4)
    for number in range(0, 20, 2):
        write(one, number)
        write(other, number + 1)
        assert len(held(one)) <= 4
    assert held(one) == held(other) == [16, 17, 18, 19]
    assert read(one, 19)
    other.delete(key(19))
    assert read(one, 19) is None
    write(one, 19)  # it knows that it is gone
    assert read(other, 19)


def test_the_folder_is_its_owners_alone(open_disk, tmp_path):
    write(open_disk(), 1)
    for path in (tmp_path / "kvjax-kv-2").rglob("*"):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) or path.parent.stat().st_mode & 0o77 == 0, path
    assert stat.S_IMODE((tmp_path / "kvjax-kv-2").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "kvjax-kv-2" / key(1)[:2] / key(1)).stat().st_mode) == 0o600


def test_the_file_system_keeps_its_free_space(open_disk):
    write(open_disk(), 1)
    tier = open_disk(least_free=1 << 60)
    with pytest.raises(TierError) as error:
        write(tier, 2)
    assert error.value.reason == "full"
    assert held(tier) == [1], "what would not help is not thrown out"


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EIO, "io")])
def test_an_error_of_the_system_is_a_tier_error(open_disk, monkeypatch, number, reason):
    tier = open_disk()
    write(tier, 1)

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        with pytest.raises(TierError) as error:
            read(tier, 1)
        assert error.value.reason == reason
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", fails)
        with pytest.raises(TierError) as error:
            write(tier, 2)
        assert error.value.reason == reason
    assert held(tier) == [1]


def test_a_folder_that_cannot_be_made_is_a_tier_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="Not a directory"):
        DiskTier(tmp_path / "file", SIZE)


def fill(folder, seed, seconds, failures) -> None:
    import random

    rng, tier = random.Random(seed), DiskTier(folder, 12 * SIZE, least_free=0)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            number = rng.randrange(30)
            if rng.random() < 0.5:
                write(tier, number)
            elif rng.random() < 0.1:
                tier.delete(key(number))
            else:
                assert read(tier, number) in (None, bytes([number]) * SIZE)
            with tier._alone():  # a listing beside a writer may see a block that leaves and the one that comes
                assert len(held(tier)) <= 12
    except BaseException as error:
        failures.put(repr(error))
        raise


@pytest.mark.parametrize(
    "seconds", [2, pytest.param(60, marks=pytest.mark.slow(reason="two processes on one folder for a minute"))]
)
def test_two_processes_on_one_folder(tmp_path, seconds):
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    workers = [context.Process(target=fill, args=(tmp_path, seed, seconds, failures)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds + 60)
    assert failures.empty(), failures.get()
    assert [worker.exitcode for worker in workers] == [0, 0]
    DiskTier(tmp_path, 12 * SIZE, least_free=0).check_integrity()


@pytest.mark.timing
def test_a_list_of_ten_thousand_blocks_takes_less_than_a_second(tmp_path):
    DiskTier(tmp_path, SIZE, least_free=0).close()
    for number in range(10_000):
        (tmp_path / "kvjax-kv-2" / key(number)[:2] / key(number)).touch()
    began = time.thread_time()  # of this thread alone, whatever else the machine does
    tier = DiskTier(tmp_path, 1 << 40, least_free=0)
    assert time.thread_time() - began < 1.0
    assert len(tier) == 10_000
    tier.close()
