"""What the engine plans with is what it takes, and what cannot fit is refused with a way out."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from kvjax import models
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import InsufficientMemoryError, check_fits, free_bytes, plan
from kvjax.engine.device.runner import Runner
from kvjax.engine.engine import Engine
from kvjax.store.sizes import show_size
from tests.engine.tiny import CONFIG, CONTEXT, GLOBAL

GIB = 1 << 30
LARGE = dataclasses.replace(CONFIG, width=1024, mlp_width=4096, vocab_size=32_000, head_dim=64, max_position=16_384)
LAYOUT = ResolvedConfig.resolve(EngineConfig(max_num_seqs=8), LARGE.max_position, "gpu")


def declare(token_budget: int | None = None) -> CacheConfig:
    config = EngineConfig(max_num_seqs=3, token_budget=token_budget, headroom=32)
    return CacheConfig.declare(CONFIG, ResolvedConfig.resolve(config, CONTEXT, "cpu"))


def total(layout: ResolvedConfig) -> int:
    return sum(plan(CacheConfig.declare(LARGE, layout)).values())


@pytest.mark.parametrize("token_budget", [None, 32])
def test_the_plan_is_what_a_runner_holds(token_budget):
    caches = declare(token_budget)
    before = jax.live_arrays()  # kept, so that none of their ids is given to another
    runner = Runner(models.random(CONFIG, jax.random.key(0)), caches)
    prefill = runner.begin(np.zeros(CONTEXT - 1, np.int32), slot=0)
    runner.advance(prefill)
    known = {id(array) for array in before}
    held = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
    planned = plan(caches)
    assert sum(planned.values()) - planned["temporaries"] == pytest.approx(held, abs=64)  # a scalar or two


def test_xla_needs_no_more_temporaries_than_planned():
    caches = declare()
    Runner(models.random(CONFIG, jax.random.key(0)), caches).warm_up()
    ours = [
        executable.get_compiled_memory_stats().temp_size_in_bytes
        for executable in jax.devices()[0].client.live_executables()
        if executable.hlo_modules()[0].name in ("jit_prefill_layer", "jit_decode", "jit_score", "jit_first_token")
    ]
    assert 0 < max(ours) <= plan(caches)["temporaries"]


@pytest.mark.parametrize("token_budget", [256, 1024])
@pytest.mark.parametrize("context", [16_384, 65_536])
def test_a_budget_keeps_its_share_and_holds_less_than_half_until_then(context, token_budget):
    """Of the full cache 1/c^r stays, and what the pages' summaries take; weights and temporaries are those of any."""
    model = dataclasses.replace(LARGE, layers=(GLOBAL,) * 8, num_heads=8, num_kv_heads=4, max_position=context)

    def declare(token_budget: int | None) -> tuple[CacheConfig, int]:
        config = EngineConfig(max_num_seqs=1, token_budget=token_budget)
        caches = CacheConfig.declare(model, ResolvedConfig.resolve(config, context, "gpu"))
        parts = plan(caches)
        return caches, sum(parts.values()) - parts["weights"] - parts["temporaries"]

    (full, most), (ours, held) = declare(None), declare(token_budget)
    assert held < most / 2
    compression = context / token_budget
    share = compression ** -min(0.2 + 0.06 * math.log2(compression), 0.8)
    length = context - ours.layout.headroom
    pages = sum(math.ceil(layer.retained(length) / layer.page_size) for layer in ours.plans)
    summaries = pages * model.num_kv_heads * 2 * model.head_dim  # of one byte a number, half the cache's
    assert summaries < ours.retained_bytes(length) <= share * full.full_bytes(length) + summaries


def test_what_fits_is_not_refused():
    check_fits(LARGE, LAYOUT, total(LAYOUT))
    check_fits(LARGE, LAYOUT, None)  # a machine that does not say


def test_one_byte_short_names_fewer_conversations_and_they_fit():
    with pytest.raises(InsufficientMemoryError, match=r"--max-num-seqs (\d) fits") as refused:
        check_fits(LARGE, LAYOUT, total(LAYOUT) - 1)
    assert show_size(total(LAYOUT)) in str(refused.value)
    assert "--max-num-seqs 7 fits" in str(refused.value)
    check_fits(LARGE, dataclasses.replace(LAYOUT, max_num_seqs=7), total(LAYOUT) - 1)


def test_one_conversation_too_long_names_a_length_that_fits():
    one = dataclasses.replace(LAYOUT, max_num_seqs=1)
    with pytest.raises(InsufficientMemoryError, match=r"--max-model-len \d+ fits") as refused:
        check_fits(LARGE, one, total(one) - 1)
    length = int(str(refused.value).split("--max-model-len ")[1].split()[0])
    check_fits(LARGE, dataclasses.replace(one, max_model_len=length), total(one) - 1)
    with pytest.raises(InsufficientMemoryError):
        check_fits(LARGE, dataclasses.replace(one, max_model_len=length + 256), total(one) - 1)


def test_weights_too_large_name_more_devices():
    with pytest.raises(InsufficientMemoryError, match="--tensor-parallel-size"):
        check_fits(LARGE, LAYOUT, 1 << 20)


def test_an_engine_refuses_before_it_reads_weights(folder, monkeypatch):
    monkeypatch.setattr("kvjax.engine.engine.free_bytes", lambda: 1000)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("read the weights"))
    with pytest.raises(InsufficientMemoryError, match="1000 B are free"):
        Engine.from_pretrained(folder).start()


def test_a_device_that_runs_full_names_what_to_lower(folder, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(models, "load", full)
    with pytest.raises(InsufficientMemoryError, match="while loading: lower --max-num-seqs"):
        Engine.from_pretrained(folder).start()


def test_this_machine_says_what_is_free():
    free = free_bytes()
    assert free is not None
    assert 100 * (1 << 20) < free < 10_000 * GIB
