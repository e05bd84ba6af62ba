"""KV that outlives the engine: after a restart, from another process, and from files that somebody has harmed."""

import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS
from tests.engine import tiny
from tests.engine.test_prefix import CHUNK, Everything, ask, engine_of, equal
from tests.store import chains

PROMPT = tiny.prompt(850, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("prefix"))


def disk(folder: Path, **settings) -> StoreConfig:
    return StoreConfig(
        host_cache_size=1 << 22,
        disk_cache=folder,
        disk_cache_size=1 << 30,
        **{"prefetch_policy": "wait_complete", **settings},
    )


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """A folder with the KV of PROMPT, and the answer of the engine that wrote it."""
    place = tmp_path_factory.mktemp("written")
    with engine_of(folder, disk(place)) as engine:
        cold = ask(engine, PROMPT)
        engine.drain(20.0)
    return place, cold


@pytest.fixture
def copied(written, tmp_path):
    """As `written`, for one test alone."""
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, written[1]


def test_after_a_restart_the_disk_answers_as_the_first_run_did(folder, copied):
    place, cold = copied
    with engine_of(folder, disk(place)) as engine:
        warm = ask(engine, PROMPT)
        assert warm.cached_tokens == 768
        assert engine.store_stats()["disk"].hits == 3
        equal(cold, warm)
        assert ask(engine, PROMPT, "another tenant").cached_tokens == 0


def forget_host(engine: Engine) -> None:
    """Only the tiers below hold anything now."""
    chains.forget_host(engine._prefix.store)


def test_prompts_that_end_at_a_block_or_a_token_beside_come_from_the_disk_to_the_bit(folder, copied):
    with engine_of(folder, disk(copied[0])) as engine:
        window, hits, engine._prefix.store.planner = max(engine.caches.window, 1), 0, Everything()
        for length in (255, 256, 257, 511, 512, 513, 767, 768, 769):
            forget_host(engine)
            warm, cold = ask(engine, PROMPT[:length]), ask(engine, PROMPT[:length], f"cold {length}")
            assert (cold.cached_tokens, warm.cached_tokens) == (0, (length - window) // CHUNK * CHUNK)
            equal(cold, warm)
            hits += warm.cached_tokens // BLOCK_TOKENS
            assert engine.store_stats()["disk"].hits == hits
        assert hits >= 9


class FailingWrite:
    """`os.pwrite`, but from one call on all fail as they do on a full or a broken disk."""

    def __init__(self, call: int, error: int) -> None:
        self._write, self._left, self._error = os.pwrite, call, error

    def __call__(self, file, blob, offset):
        self._left -= 1
        if self._left <= 0:
            raise OSError(self._error, os.strerror(self._error))
        return self._write(file, blob, offset)


def test_serving_goes_on_whichever_write_fails(folder, tmp_path):
    errors = {errno.ENOSPC: "full", errno.EIO: "io"}
    with engine_of(folder, disk(tmp_path)) as engine:
        store = engine._prefix.store
        [guard], store.planner = store.tiers, Everything()
        cold = ask(engine, PROMPT, "cold")
        for error, call in itertools.product(errors, (1, 2, 3)):
            salt = f"{error} {call}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "pwrite", FailingWrite(call, error))
                equal(cold, ask(engine, PROMPT, salt))
            forget_host(engine)
            warm = ask(engine, PROMPT, salt)
            assert warm.cached_tokens < 768, "one of the three is missing"
            equal(cold, warm)
            forget_host(engine)
            again = ask(engine, PROMPT, salt)
            assert again.cached_tokens == 768, "it was written the next time"
            equal(cold, again)
        counts = engine.store_stats()["disk"].errors
        assert all(counts[reason] >= 3 for reason in errors.values())
        assert counts.keys() <= {*errors.values(), "parent"}, "blocks behind one that was not written are not either"
        guard._tier.check_integrity()


def test_another_view_of_the_same_kv_takes_it_from_the_disk(folder, copied):
    """The full KV does not depend on how much of it a method keeps, nor on how layers are grouped."""
    with engine_of(folder, disk(copied[0]), "rocketkv", group_layers=1) as engine:
        warm = ask(engine, PROMPT)
        assert warm.cached_tokens == 768
        equal(ask(engine, PROMPT, "cold"), warm)


@pytest.mark.parametrize("change", ["weights", "chunk", "dtype"])
def test_what_would_compute_other_bits_shares_nothing(folder, copied, tmp_path, change):
    other, settings = folder, {}
    if change == "weights":
        other = tiny.write(tmp_path / "other", dataclasses.replace(tiny.CONFIG, norm_eps=2e-5))
    elif change == "chunk":
        settings = {"prefill_chunk_size": 512}
    else:
        settings = {"kv_cache_dtype": "bfloat16"}
    config = dataclasses.replace(EngineConfig(max_model_len=900, max_num_seqs=2, prefill_chunk_size=CHUNK), **settings)
    with Engine.from_pretrained(other, dataclasses.replace(config, store=disk(copied[0]))) as engine:
        assert ask(engine, PROMPT).cached_tokens == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "empty"])
def test_harmed_files_cost_a_recompute_and_nothing_else(folder, copied, harm):
    place, cold = copied
    files = sorted(path for path in place.rglob("*") if len(path.name) == 64)
    assert len(files) == 4, "three blocks and the tail"
    blobs = [path.read_bytes() for path in files]
    for path, blob, other in zip(files, blobs, [*blobs[1:], blobs[0]], strict=True):
        flipped = bytes([*blob[:-100], blob[-100] ^ 16, *blob[-99:]])
        path.write_bytes({"flip": flipped, "cut": blob[:-1], "swap": other, "empty": b""}[harm])
    with engine_of(folder, disk(place)) as engine:
        warm = ask(engine, PROMPT)
        assert warm.cached_tokens == 0
        equal(cold, warm)
        assert 1 <= sum(engine.store_stats()["disk"].errors.values()) <= 3, "nothing behind the first is needed"
        equal(cold, ask(engine, PROMPT))


PROGRAM = """
import sys
from pathlib import Path
from tests.engine.test_prefix import ask, engine_of
from tests.engine.test_prefix_disk import PROMPT, disk
with engine_of(Path(sys.argv[1]), disk(Path(sys.argv[2]))) as engine:
    answer = ask(engine, PROMPT)
    print(answer.cached_tokens, *answer.tokens)
"""


def test_another_process_with_another_hash_seed_finds_it(folder, copied):
    place, cold = copied
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(place)],
        env={**os.environ, "PYTHONPATH": ".", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert printed == ["768", *map(str, cold.tokens)]
