"""Digests of weights: every byte and every name counts, and no file is read twice."""

import hashlib
import json
import os
import time

import numpy as np
import pytest

from kvjax.store import digest
from kvjax.store.digest import files_digest


@pytest.fixture
def files(tmp_path):
    for name, content in (("a.safetensors", b"one"), ("b.safetensors", b"two")):
        (tmp_path / name).write_bytes(content)
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_contents_and_names_count_and_the_order_does_not(files, tmp_path):
    first = files_digest(files)
    assert files_digest(reversed(files)) == first
    assert len(first) == 64
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert files_digest([tmp_path / "c.safetensors", files[1]]) != first
    files[1].write_bytes(b"twO")
    (tmp_path / "c.safetensors").rename(files[0])
    assert files_digest(files) != first


def test_a_known_file_is_not_read_again_until_it_changes(files, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "digests.json"
    first = files_digest(files, cache)
    with monkeypatch.context() as patch:
        patch.setattr(digest, "_digest", lambda path: pytest.fail(f"{path} was read again"))
        assert files_digest(files, cache) == first
    files[0].write_bytes(b"One")
    os.utime(files[0], ns=(1, 1))
    assert files_digest(files, cache) != first


def rewrite_in_place(path, offset: int, content: bytes) -> None:
    """Size, inode and time of the contents stay as they are."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (before.st_size, before.st_ino, before.st_mtime_ns)


def test_a_file_rewritten_in_place_is_read_again_though_its_time_was_set_back(tmp_path):
    path, cache = tmp_path / "model.safetensors", tmp_path / "digests.json"
    path.write_bytes(bytes(3 << 20))
    first = files_digest([path], cache)
    time.sleep(0.05)  # more than a tick of the file system's clock
    rewrite_in_place(path, 12_345, b"x")
    assert files_digest([path], cache) == files_digest([path]) != first


@pytest.mark.parametrize("size", [100, 4096, 5000, 3 << 20])
def test_a_sample_sees_what_no_time_says(tmp_path, monkeypatch, size):
    """As on a file system that keeps no ctime of its own."""
    path, cache = tmp_path / "model.safetensors", tmp_path / "digests.json"
    path.write_bytes(np.random.default_rng(0).bytes(size))
    stat = path.stat()
    monkeypatch.setattr(digest.os, "fstat", lambda file: stat)
    digests = {files_digest([path], cache)}
    for offset in (0, size // 2, size - 1):
        content = np.random.default_rng(offset + 1).bytes(max(size // 16, 1))[: size - offset]
        rewrite_in_place(path, offset, content)
        digests.add(files_digest([path], cache))
        assert files_digest([path], cache) == files_digest([path])
    assert len(digests) == 4


def test_the_cache_is_readable_has_one_entry_a_file_and_computes_those_of_an_older_form_anew(files, tmp_path):
    cache = tmp_path / "digests.json"
    stat = files[0].stat()
    old = f"{files[0].resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    wrong = "0" * 64
    cache.write_text(json.dumps({old: wrong, str(files[1].resolve()): {"version": "x", "sha256": 5}, "y": None}))
    for content in (b"one", b"oNe"):
        files[0].write_bytes(content)
        assert files_digest(files, cache) == files_digest(files)
    known = json.loads(cache.read_text())
    assert known.keys() == {str(path.resolve()) for path in files}
    assert known[str(files[0].resolve())]["sha256"] == hashlib.sha256(b"oNe").hexdigest()
    assert known[str(files[0].resolve())]["version"].startswith("3:")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_broken_cache_is_ignored_and_replaced(files, tmp_path, content):
    cache = tmp_path / "digests.json"
    cache.write_text(content)
    assert files_digest(files, cache) == files_digest(files)
    assert len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(files, tmp_path):
    assert files_digest(files, tmp_path / "a.safetensors" / "digests.json") == files_digest(files)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files_digest([tmp_path / "missing"])
