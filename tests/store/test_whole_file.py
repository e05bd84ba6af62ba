"""Files that are whole or not there, on file systems that write past the page cache and on others."""

import errno
import fcntl
import mmap
import os
import stat
from pathlib import Path

import pytest

from kvjax.store.whole_file import DIRECT, PartialFile, remove_if_dead

PAGE = 4096
SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 100]


def write_whole(path: Path, blob: memoryview, *, sync: bool) -> None:
    with PartialFile(path, blob.nbytes) as file:
        file.fill(blob, sync=sync)
        file.commit()
        if sync:
            file.sync_name()


def memory(size: int, begin: int = 0) -> memoryview:
    """Bytes that begin so many after a page does."""
    block = mmap.mmap(-1, size + begin + PAGE)
    block[:] = bytes(index * 7 % 251 for index in range(len(block)))
    return memoryview(block)[begin : begin + size]


@pytest.fixture
def writes(monkeypatch):
    """(bytes, whether directly) of each write."""
    seen, write = [], os.pwrite

    def counted(file, blob, offset):
        seen.append((len(blob), bool(fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT)))
        return write(file, blob, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    return seen


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("begin", [0, 1, 512])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_there_and_its_owners_alone(tmp_path, size, begin, sync):
    blob, path = memory(size, begin), tmp_path / "file"
    write_whole(path, blob, sync=sync)
    assert path.read_bytes() == bytes(blob)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_whole_pages_pass_by_the_page_cache(tmp_path, writes):
    write_whole(tmp_path / "file", memory(3 * PAGE + 100), sync=False)
    if not writes[0][1]:
        pytest.skip("not on this file system")
    assert writes == [(3 * PAGE, True), (100, False)]


def test_memory_that_begins_elsewhere_is_written_all_the_same(tmp_path, writes):
    write_whole(tmp_path / "file", memory(3 * PAGE, begin=512), sync=False)
    assert writes == [(3 * PAGE, False)]


@pytest.mark.parametrize("refuses", ["to begin", "to write"])
def test_a_file_system_that_knows_only_its_page_cache(tmp_path, monkeypatch, refuses):
    blob, control, write = memory(3 * PAGE + 100), fcntl.fcntl, os.pwrite

    def no_control(file, command, flags=0):
        if command == fcntl.F_SETFL and flags & DIRECT:
            raise OSError(errno.EINVAL, "told to refuse")
        return control(file, command, flags)

    def no_write(file, data, offset):
        if control(file, fcntl.F_GETFL) & DIRECT:
            raise OSError(errno.EINVAL, "told to refuse")
        return write(file, data, offset)

    if refuses == "to begin":
        monkeypatch.setattr(fcntl, "fcntl", no_control)
    else:
        monkeypatch.setattr(os, "pwrite", no_write)
    write_whole(tmp_path / "file", blob, sync=False)
    assert (tmp_path / "file").read_bytes() == bytes(blob)


@pytest.mark.parametrize("most", [1, 700, PAGE, PAGE + 1])
def test_a_write_that_ends_early_goes_on(tmp_path, monkeypatch, most):
    blob, write = memory(3 * PAGE + 100), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, bytes(data[:most]), offset))
    write_whole(tmp_path / "file", blob, sync=False)
    assert (tmp_path / "file").read_bytes() == bytes(blob)


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "rename"])
def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, call):
    def fails(*_, **__):
        raise OSError(errno.EIO, "told to fail")

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="told to fail"):
        write_whole(tmp_path / "file", memory(PAGE), sync=True)
    assert not list(tmp_path.iterdir())


def test_a_file_has_its_full_size_from_the_beginning_and_lives_as_long_as_its_writer(tmp_path):
    with PartialFile(tmp_path / "file", 3 * PAGE) as file, PartialFile(tmp_path / "file", PAGE) as other:
        assert file.temporary.stat().st_size == 3 * PAGE
        assert file.temporary != other.temporary
        assert not remove_if_dead(file.temporary)
        file.fill(memory(3 * PAGE), sync=False)
        assert not (tmp_path / "file").exists()
        file.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert remove_if_dead(tmp_path / "file"), "of nobody who lives"
    assert remove_if_dead(tmp_path / "file"), "it is gone"
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file_gets_another_name(tmp_path):
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "notes.txt").write_text("mine")
    write_whole(tmp_path / "file", memory(PAGE), sync=False)
    assert (tmp_path / "file").read_bytes() == bytes(memory(PAGE))
    assert [path.read_text() for path in tmp_path.glob("*/notes.txt")] == ["mine"]
