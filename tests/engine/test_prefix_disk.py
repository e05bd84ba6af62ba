"""KV that outlives the engine: after a restart, from another process, and from files that somebody has harmed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.store.config import StoreConfig
from tests.engine import tiny
from tests.engine.test_prefix import PIECE, ask, engine_of, equal


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


def test_after_a_restart_the_disk_answers_as_the_first_run_did(folder, tmp_path):
    prompt = tiny.prompt(850, seed=5)
    with engine_of(folder, disk(tmp_path)) as engine:
        cold = ask(engine, prompt)
        engine.drain(20.0)
    with engine_of(folder, disk(tmp_path)) as engine:
        warm = ask(engine, prompt)
        assert warm.cached_tokens == 768
        assert engine.store_stats()["disk"].hits == 3
        equal(cold, warm)
        assert ask(engine, prompt, "another tenant").cached_tokens == 0


def test_another_view_of_the_same_kv_takes_it_from_the_disk(folder, tmp_path):
    """The full KV does not depend on how much of it a method keeps, nor on how layers are grouped."""
    prompt = tiny.prompt(850, seed=5)
    with engine_of(folder, disk(tmp_path)) as engine:
        ask(engine, prompt)
        engine.drain(20.0)
    with engine_of(folder, disk(tmp_path), "rocketkv", group_layers=1) as engine:
        warm = ask(engine, prompt)
        assert warm.cached_tokens == 768
        equal(ask(engine, prompt, "cold"), warm)


@pytest.mark.parametrize("change", ["weights", "piece", "dtype"])
def test_what_would_compute_other_bits_shares_nothing(folder, tmp_path, change):
    prompt = tiny.prompt(850, seed=5)
    with engine_of(folder, disk(tmp_path)) as engine:
        ask(engine, prompt)
        engine.drain(20.0)
    other, settings = folder, {}
    if change == "weights":
        other = tiny.write(tmp_path / "other", dataclasses.replace(tiny.CONFIG, norm_eps=2e-5))
    elif change == "piece":
        settings = {"prefill_piece": 512}
    else:
        settings = {"kv_cache_dtype": "bfloat16"}
    config = dataclasses.replace(EngineConfig(max_model_len=900, max_num_seqs=2, prefill_piece=PIECE), **settings)
    store = disk(tmp_path)
    with Engine.from_pretrained(other, dataclasses.replace(config, store=store)) as engine:
        assert ask(engine, prompt).cached_tokens == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "swap", "empty"])
def test_harmed_files_cost_a_recompute_and_nothing_else(folder, tmp_path, harm):
    prompt = tiny.prompt(850, seed=5)
    with engine_of(folder, disk(tmp_path)) as engine:
        cold = ask(engine, prompt)
        engine.drain(20.0)
    files = sorted(path for path in tmp_path.rglob("*") if len(path.name) == 64)
    assert len(files) == 3
    for path in files:
        blob = bytearray(path.read_bytes())
        if harm == "flip":
            blob[-100] ^= 16
        elif harm == "cut":
            del blob[-1:]
        elif harm == "swap":
            blob[:] = files[0].read_bytes() if path != files[0] else files[2].read_bytes()
        else:
            blob.clear()
        path.write_bytes(blob)
    with engine_of(folder, disk(tmp_path)) as engine:
        warm = ask(engine, prompt)
        assert warm.cached_tokens == 0
        equal(cold, warm)
        assert 1 <= sum(engine.store_stats()["disk"].errors.values()) <= 3, "nothing behind the first is needed"
        equal(cold, ask(engine, prompt))


PROGRAM = """
import sys
from pathlib import Path
from tests.engine import tiny
from tests.engine.test_prefix import ask, engine_of
from tests.engine.test_prefix_disk import disk
with engine_of(Path(sys.argv[1]), disk(Path(sys.argv[2]))) as engine:
    print(*ask(engine, tiny.prompt(850, seed=5)).tokens)
    engine.drain(20.0)
"""


def test_what_another_process_wrote_is_used(folder, tmp_path):
    written = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": ".", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    with engine_of(folder, disk(tmp_path)) as engine:
        warm = ask(engine, tiny.prompt(850, seed=5))
    assert warm.cached_tokens == 768
    assert list(map(str, warm.tokens)) == written
