"""The planner's bytes are those of the arrays that an engine allocates, and its verdicts agree with the engine's."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from kvjax import cache, models
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import InsufficientMemoryError, check_fits, plan
from kvjax.engine.device.runner import Runner
from kvjax.plan import Deployment, Device, estimate
from kvjax.plan.devices import Chip
from kvjax.plan.loading import TierRate, prefix
from kvjax.plan.render import as_json
from kvjax.plan.roofline import decode_step, prefill_seconds
from tests.engine.tiny import CONFIG, CONTEXT

CHIP = Chip("cpu", 64 << 20, 1e9, 1e12, 1e9)  # a CPU lays an engine out as the tests' own machine does
ONE = Device("tiny", CHIP, 1)
ENGINE = EngineConfig(max_num_seqs=3, token_budget=64, headroom=32)


def ask(**changes) -> Deployment:
    return Deployment(**({"model": CONFIG, "device": ONE, "config": ENGINE} | changes))


def declare(config: EngineConfig = ENGINE) -> CacheConfig:
    return CacheConfig.declare(CONFIG, ResolvedConfig.resolve(config, CONTEXT, "cpu"))


def nbytes(tree) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def test_the_bytes_are_those_of_the_arrays_that_an_engine_allocates():
    result = estimate(ask())
    runner = Runner(models.random(CONFIG, jax.random.key(0)), declare())
    prefill = runner.begin(np.zeros(CONTEXT - 1, np.int32), slot=0)
    runner.advance(prefill)
    bounds = nbytes([view.bounds for view in runner.views])
    assert bounds > 0
    assert result.requested.memory == {
        "weights": nbytes((runner.model.trunk_leaves, runner.model.layer_leaves)),
        "views": nbytes(runner.views) - bounds,
        "page summaries": bounds,
        "decode state": nbytes(runner.state),
        "workspaces": nbytes(runner._workspaces[1]),
        "hidden states": prefill.hidden.nbytes,
        "temporaries": result.requested.memory["temporaries"],
    }


def test_the_full_cache_is_that_of_an_engine_without_a_budget():
    result = estimate(ask())
    alone = estimate(ask(config=EngineConfig(max_num_seqs=3)))
    assert alone.compressed is None
    assert result.full == alone.full == alone.requested
    assert result.ratio > 1
    assert alone.ratio == 1


def test_what_fits_is_what_the_engine_would_admit():
    needed = estimate(ask()).requested.nbytes
    exact = Device("tiny", dataclasses.replace(CHIP, memory=needed), 1)
    result = estimate(ask(device=exact, share=1.0))
    assert result.requested.fits
    assert result.requested.most == 3
    short = dataclasses.replace(exact, chip=dataclasses.replace(CHIP, memory=needed - 1))
    result = estimate(ask(device=short, share=1.0))
    assert not result.requested.fits
    assert result.requested.most == 2
    with pytest.raises(InsufficientMemoryError, match="--max-num-seqs 2 fits"):
        check_fits(CONFIG, result.layout, needed - 1)


def test_a_device_of_two_holds_half_of_what_is_split_by_heads():
    caches, mesh = declare(), AbstractMesh((2,), (cache.TENSOR,))
    whole, part = plan(caches), plan(caches, mesh)
    for purpose in ("decode state", "hidden states"):
        assert part[purpose] == whole[purpose]
    used = sum(view.used.nbytes + 4 * view.used.nbytes * (view.limits is not None) for view in caches.views)
    assert 2 * part["views"] == whole["views"] + used  # counters and terms of slots are on both
    assert 2 * part["workspaces"] == whole["workspaces"]
    assert whole["weights"] / 2 < part["weights"] < 0.55 * whole["weights"]  # norms are on both
    shares = nbytes_on_one(models.abstract(CONFIG), mesh)
    assert part["weights"] == shares


def nbytes_on_one(decoder, mesh) -> int:
    """The same from the shardings that a checkpoint is loaded with."""
    from flax import nnx

    arrays = jax.tree.leaves(nnx.state(decoder, nnx.Param))
    placed = jax.tree.leaves(models.shardings(decoder, mesh))
    return sum(4 * int(np.prod(s.shard_shape(a.shape))) for a, s in zip(arrays, placed, strict=True))


def test_heads_that_cannot_be_split_are_refused_with_what_can():
    with pytest.raises(ValueError, match=r"device 'tiny-4' has 4 parts: .*num_kv_heads \(2\); possible: 1, 2"):
        estimate(ask(device=Device("tiny-4", CHIP, 4)))


def test_a_decode_step_reads_the_weights_but_the_table_and_what_views_say():
    caches = declare()
    step = decode_step(caches, ONE)
    total = plan(caches)["weights"]
    table = CONFIG.vocab_size * CONFIG.width * 4
    assert step.weights == total - table
    assert step.kv == 3 * caches.read_bytes(CONTEXT)
    assert step.seconds == step.nbytes / CHIP.bandwidth
    slow = Device("slow", dataclasses.replace(CHIP, flops=1e6), 1)
    assert decode_step(caches, slow).seconds == step.operations / 1e6
    halves = decode_step(caches, Device("two", CHIP, 2))
    assert halves.kv * 2 == pytest.approx(step.kv, abs=2)
    assert halves.seconds < step.seconds
    tied = dataclasses.replace(CONFIG, tied=True)
    caches = CacheConfig.declare(tied, caches.layout)
    assert decode_step(caches, ONE).weights == plan(caches)["weights"]  # the table is the head


def test_prefill_counts_every_pair_of_query_and_key_once():
    caches = declare(EngineConfig(prefill_chunk_size=256))
    slow = Device("slow", dataclasses.replace(CHIP, flops=1.0), 1)
    weights = sum(value for path, value in shapes().items() if path.startswith("layers."))
    for chunk, seconds in enumerate(prefill_seconds(caches, slow, 3)):
        pairs = 0
        for layer in CONFIG.layers:
            for position in range(chunk * 256, (chunk + 1) * 256):
                pairs += min(position + 1, layer.window or CONTEXT)
        assert seconds == 2 * 256 * weights + 4 * CONFIG.num_heads * CONFIG.head_dim * pairs


def shapes() -> dict[str, int]:
    from kvjax.models.parameters import walk

    return {path: int(np.prod(param.shape)) for path, param in walk(models.abstract(CONFIG))}


def test_loading_wins_where_it_is_faster_and_the_store_would_choose_it():
    caches = declare(EngineConfig(prefill_chunk_size=256))
    compute = prefill_seconds(caches, ONE, 3)
    chunk = prefix(caches, ONE, (TierRate("host", 1.0),)).nbytes / 3
    # the middle of three chunks' growing costs: what loads one in that time wins over two or three together
    tiers = [TierRate(name, chunk / seconds) for name, seconds in zip(("host", "disk", "remote"), compute, strict=True)]
    loads = prefix(caches, ONE, (TierRate("host", 1e30), *tiers)).loads
    assert loads[0].break_even == 256
    assert loads[0].tokens == 768
    assert loads[2].seconds == pytest.approx(3 * compute[1])
    assert loads[3].break_even is None  # as slow as the dearest chunk
    assert loads[3].tokens == 0
    result = prefix(caches, ONE, (TierRate("host", 1e30), TierRate("disk", 1.0)))
    assert result.even_bandwidth == result.nbytes / sum(compute)
    bound = prefix(caches, ONE, (TierRate("host", 5.0), TierRate("disk", 9.0)))
    assert [load.bandwidth for load in bound.loads] == [5.0, 5.0]


def test_an_answer_is_json():
    said = json.loads(json.dumps(as_json("tiny", estimate(ask()))))
    assert said["this"]["fits"] is True
    assert said["this"]["bytes"] == sum(said["this"]["memory"].values())
    assert said["full"]["memory"]["page summaries"] == 0
