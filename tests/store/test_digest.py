"""Digests of weights: every byte and every name counts, and no file is read twice."""

import json
import os

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


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
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
