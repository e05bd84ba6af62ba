"""A harmed file on the disk, whatever the harm: a miss that is counted, a file that is gone, and never other KV."""

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kvjax.store.block import BlockLayout
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.keys import BlockKey
from kvjax.store.store import KVStore
from tests.store.chains import FORMAT, NAMESPACE, blob_of, holds, names_of, save, store_of
from tests.store.test_store import wait_until

NAMES = names_of(3)
SMALL = BlockLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32")  # 96 times 64 bytes


def open_store(folder, format: BlockLayout = FORMAT) -> KVStore:
    disk = DiskTier(folder, 1 << 30, least_free=0)
    return store_of(disk) if format is FORMAT else KVStore(format, StoreConfig(host_cache_size=1 << 20), (disk,))


def path_of(folder, name: BlockKey):
    return folder / "kvjax-kv-2" / name.hex[:2] / name.hex


def loaded(store: KVStore, names: list[BlockKey]) -> list[np.ndarray]:
    """The blocks that a fetch brings."""
    done = threading.Event()
    with store.load(names, unit=1, on_done=done.set) as fetch:
        assert done.wait(10)
        blobs = [fetch.blob(index).copy() for index in range(fetch.loaded)]
    assert store.wait(10.0)
    return blobs


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda blob: bytes([*blob[:place], blob[place] ^ 4, *blob[place:][1:]])


def with_header(text: bytes, claimed: int | None = None) -> bytes:
    """As long as a block, with another header."""
    begin = (len(text) if claimed is None else claimed).to_bytes(8, "little") + text
    return begin + bytes(FORMAT.nbytes - len(begin))


def of_another_model(format: BlockLayout) -> bytes:
    """As long as ours, whole, and with our name: only what it holds is other than it should be."""
    assert format.nbytes == FORMAT.nbytes
    return blob_of(NAMES[1], format).tobytes()


def of_other_weights() -> bytes:
    """What a model of the same shape has for the same tokens."""
    root = dataclasses.replace(NAMESPACE, weights="x" * 64).root()
    return blob_of(BlockKey(hashlib.sha256(root).digest(), root, NAMES[1].tokens)).tobytes()


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "the length of the header": flipped(3),
    "the header": flipped(200),
    "the first byte of the tensors": flipped(FORMAT.start),
    "the last byte": flipped(FORMAT.nbytes - 1),
    "empty": lambda blob: b"",
    "cut": lambda blob: blob[:-1],
    "cut after the header": lambda blob: blob[: FORMAT.start],
    "longer": lambda blob: blob + b"\0",
    "zeros, as after a power cut": lambda blob: bytes(len(blob)),
    "its end in zeros": lambda blob: blob[:-4096] + bytes(4096),
    "swapped with the next": lambda blob: blob_of(NAMES[2]).tobytes(),
    "of another prompt": lambda blob: blob_of(names_of(3, seed=1)[1]).tobytes(),
    "of another tenant": lambda blob: blob_of(names_of(3, salt="b")[1]).tobytes(),
    "of a model with other heads": lambda blob: of_another_model(BlockLayout(2, 4, 2, "float32")),
    "of a model with other layers": lambda blob: of_another_model(BlockLayout(1, 4, 4, "float32")),
    "of a model with another dtype": lambda blob: of_another_model(BlockLayout(2, 2, 8, "bfloat16")),
    "of other weights": lambda blob: of_other_weights(),
    "a header longer than the file": lambda blob: with_header(b"{}", 1 << 62),
    "a header of nothing": lambda blob: with_header(b""),
    "a header that is no JSON": lambda blob: with_header(b"\xff{" * 99),
    "a header that never ends": lambda blob: with_header(b"[" * 10_000),
    "a header of huge tensors": lambda blob: blob.replace(b"[2,256,4]", b"[9,999,9]"),
    "a header that says other checksums": lambda blob: blob.replace(b'"crc32c":"', b'"crc32c":"0')[: len(blob)],
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_file_is_a_miss_is_counted_and_is_gone(tmp_path, harm):
    first = open_store(tmp_path)
    save(first, NAMES)
    assert first.flush(10.0)
    first.close()
    path = path_of(tmp_path, NAMES[1])
    whole = path.read_bytes()
    path.write_bytes(HARMS[harm](whole))
    assert path.read_bytes() != whole
    store = open_store(tmp_path)
    [alone] = loaded(store, NAMES)
    assert holds(alone, NAMES[0])
    assert sum(store.stats()["disk"].errors.values()) == 1
    assert not path.exists()
    save(store, NAMES)  # computed again
    assert store.flush(10.0)
    store.check_integrity()
    store.close()
    assert path.read_bytes() == whole


@pytest.mark.slow(reason="each byte and each length of a file, through all of the store")
@pytest.mark.parametrize("reason", ["corrupt", "length"])
def test_each_byte_and_each_length_of_a_file(tmp_path, reason):
    store, at_once = open_store(tmp_path, SMALL), 64
    names = [names_of(1, seed=seed)[0] for seed in range(at_once)]
    blobs = [blob_of(name, SMALL).tobytes() for name in names]
    for start in range(0, SMALL.nbytes, at_once):
        for offset, (name, blob) in enumerate(zip(names, blobs, strict=True)):
            place = start + offset
            path_of(tmp_path, name).write_bytes(flipped(place)(blob) if reason == "corrupt" else blob[:place])
        with contextlib.ExitStack() as stack:
            fetches = [stack.enter_context(store.load([name], unit=1)) for name in names]
            wait_until(lambda fetches=fetches: all(fetch.done for fetch in fetches), 60.0)
            assert not [start + offset for offset, fetch in enumerate(fetches) if fetch.loaded]
        assert store.wait(60.0)
        assert not any(path_of(tmp_path, name).exists() for name in names)
    assert store.stats()["disk"].errors == {reason: SMALL.nbytes}
    path_of(tmp_path, names[0]).write_bytes(blobs[0])
    assert len(loaded(store, names[:1])) == 1
    store.check_integrity()
    store.close()
