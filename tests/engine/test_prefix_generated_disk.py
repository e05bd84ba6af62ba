"""Generated tokens after a restart: found by an engine of the same method and budget, and by nobody else."""

import dataclasses

import pytest

from tests.engine import tiny
from tests.engine.test_prefix import engine_of
from tests.engine.test_prefix_disk import disk
from tests.engine.test_prefix_generated import ask, following

PROMPT = tiny.prompt(300, seed=21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("generated"))


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """A folder with a turn of "rocketkv", and the prompt of the next."""
    store = disk(tmp_path_factory.mktemp("written"), store_generated=True)
    with engine_of(folder, store, "rocketkv") as engine:
        turn = following(PROMPT, ask(engine, PROMPT, 250))
        engine.drain(20.0)
    return store, turn


@pytest.mark.parametrize(
    ("method", "flag", "found"), [("rocketkv", True, 512), ("rocketkv", False, 256), ("rocketkv-mt", True, 256)]
)
def test_who_finds_a_turn_on_the_disk(folder, written, method, flag, found):
    store, turn = written
    store = dataclasses.replace(store, store_generated=flag, write_policy="write_back")
    with engine_of(folder, store, method) as engine:
        assert ask(engine, turn, 1).cached_tokens == found
        assert engine.store_stats()["disk"].hits == found // 256
