"""An engine over several devices answers as an engine on one does, and its caches are cut over kv heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from kvjax import models
from kvjax.cache import TENSOR
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.runner import Runner
from kvjax.engine.device.sampling import SamplerState

CONFIG = models.DecoderConfig(
    family="llama",
    vocab_size=320,
    width=64,
    mlp_width=128,
    num_heads=16,
    num_kv_heads=8,
    head_dim=16,
    layers=tuple(models.LayerConfig(models.RopeConfig(dim=16, theta=1e4), window) for window in (None, 48)),
    query_scale=0.25,
    norm_eps=1e-5,
    max_position=512,
)
PROMPT = np.random.default_rng(0).integers(0, 320, 300).astype(np.int32)
NEW_TOKENS = 24


def run(mesh: Mesh | None) -> tuple[Runner, np.ndarray, list[int]]:
    """The runner, the log-probabilities of the prompt, and greedy tokens after it."""
    decoder = models.random(CONFIG, jax.random.key(1), embedding_std=1.0)
    if mesh is not None:
        placed = jax.tree.map(jax.device_put, nnx.state(decoder, nnx.Param), models.shardings(decoder, mesh))
        nnx.update(decoder, placed)
    layout = ResolvedConfig.resolve(EngineConfig(max_num_seqs=2), CONFIG.max_position, "cpu")
    runner = Runner(decoder, CacheConfig.declare(CONFIG, layout), mesh)
    prefill = runner.begin(PROMPT, slot=1)
    while not prefill.done:
        runner.advance(prefill)
    chunks = -(-prefill.length // prefill.sizes[-1])
    scores = np.concatenate([np.asarray(runner.score(prefill, chunk).logprob) for chunk in range(chunks)])
    greedy = SamplerState.greedy(CONFIG.vocab_size)
    tokens = np.asarray(runner.finish(prefill, greedy, limit=NEW_TOKENS).token).tolist()
    while len(tokens) < NEW_TOKENS:
        steps = runner.decode(np.array([False, True]), 4)
        tokens += np.asarray(steps.sample.token)[np.asarray(steps.emitted)[:, 1], 1].tolist()
    runner.check_integrity()
    return runner, scores[: len(PROMPT) - 1], tokens


@pytest.fixture(scope="module")
def alone() -> tuple[Runner, np.ndarray, list[int]]:
    return run(None)


@pytest.mark.parametrize("size", [2, 8])
def test_several_devices_answer_as_one(devices, alone, size):
    runner, scores, tokens = run(Mesh(np.array(devices[:size]), (TENSOR,)))
    np.testing.assert_allclose(scores, alone[1], atol=1e-4)
    assert tokens == alone[2]
    # after prefill and donated steps every device still holds just its own kv heads
    for view in runner.views:
        shapes = {shard.data.shape for shard in view.k.addressable_shards}
        assert shapes == {(2, CONFIG.num_kv_heads // size, view.k.shape[2], CONFIG.head_dim)}
        assert len(view.k.addressable_shards) == size


def test_kv_heads_that_do_not_divide_name_the_flag(devices):
    config = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3)
    mesh = Mesh(np.array(devices[:2]), (TENSOR,))
    with pytest.raises(ValueError, match=r"--tensor-parallel-size 2 does not divide num_kv_heads \(3\)"):
        models.shardings(models.abstract(config, jnp.float32), mesh)
