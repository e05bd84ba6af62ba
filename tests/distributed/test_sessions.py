"""Conversations that were suspended by an engine on one device go on over two, and the other way round."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig, Finish
from tests.engine import tiny
from tests.engine.client import GREEDY, Client, settle

PROMPT = tiny.prompt(150)
PARAMS = dataclasses.replace(GREEDY, max_tokens=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def engine_of(folder: Path, park: Path, devices: int) -> Engine:
    config = EngineConfig(
        max_model_len=240,
        max_num_seqs=2,
        method="rocketkv",
        token_budget=64,
        headroom=24,
        prefill_chunk_size=256,
        tensor_parallel_size=devices,
        session_dir=park,
    )
    return Engine.from_pretrained(folder, config)


def on_host(engine: Engine) -> list[np.ndarray]:
    """All arrays of the first slot, from all devices."""
    return [
        np.asarray(leaf)[0].copy() for leaf in jax.tree.leaves((engine._runner.views, engine._runner.state.sampler))
    ]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_on_another_mesh(devices, folder, tmp_path, before, after):
    with engine_of(folder, tmp_path, before) as engine, Client() as client:
        decode = engine._runner.decode

        def slowly(*arguments):
            time.sleep(0.05)
            return decode(*arguments)

        engine._runner.decode = slowly
        caller = client.submit(engine, PROMPT, PARAMS)
        caller.wait_for(6)
        engine.drain(0.0)
        assert caller.result().finish is Finish.CANCELLED
        heard = caller.result().tokens
        saved = on_host(engine)
    with engine_of(folder, tmp_path, after) as engine, Client() as client:
        settle(engine)
        for ours, theirs in zip(saved, on_host(engine), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        going_on = client.submit(engine, PROMPT, PARAMS)
        answer = going_on.result()
        settle(engine)
        assert going_on.deltas[0].tokens == heard
        assert going_on.deltas[-1].timing.resumed == len(heard)
        for view in engine._runner.views:  # every device still holds just its own kv heads
            assert {shard.data.shape[1] for shard in view.k.addressable_shards} == {2 // after}
        again = client.submit(engine, PROMPT, PARAMS).result()
        assert answer.tokens == again.tokens
        settle(engine)
        assert engine.stats().compiles_after_warmup == 0
