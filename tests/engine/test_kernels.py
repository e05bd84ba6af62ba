"""An engine whose decode steps read with kernels: what it answers, and what it says of what they do not serve."""

import contextlib
import dataclasses
import types

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.engine import Engine, EngineConfig
from kvjax.engine.caches import CacheConfig
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.kernels import check_kernels, settle
from kvjax.engine.prefix import namespace
from kvjax.engine.sessions import identity
from kvjax.models import DecoderConfig
from tests.engine import tiny
from tests.engine.client import GREEDY, generate

BUDGET = {"method": "rocketkv", "token_budget": 32, "headroom": 32}


@pytest.fixture
def on_tpu(monkeypatch):
    """JAX says that its devices are TPUs, and kernels for them run in the interpreter, whichever thread asks."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    pltpu.set_tpu_interpret_mode(pltpu.InterpretParams())
    yield
    pltpu.set_tpu_interpret_mode(None)


def config(kernels: str, **settings) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=2, prefill_chunk_size=256, decode_steps=2, dtype="float32", attention_backend=kernels, **settings
    )


def caches(kernels: str, model: DecoderConfig = tiny.LLAMA, **settings) -> CacheConfig:
    return CacheConfig.declare(model, ResolvedConfig.resolve(config(kernels, **settings), model.max_position, "tpu"))


@pytest.mark.slow  # an interpreter runs every kernel of every step
@pytest.mark.parametrize("settings", [{}, BUDGET], ids=["full", "rocketkv"])
def test_an_engine_with_kernels_answers_as_one_without(on_tpu, tmp_path, settings):
    folder = tiny.write(tmp_path, tiny.LLAMA)
    asked = [(tiny.prompt(150), dataclasses.replace(GREEDY, max_tokens=7)), (tiny.prompt(20), GREEDY)]
    answers = {}
    for kernels in ("reference", "tpu"):
        with Engine.from_pretrained(folder, config(kernels, **settings)) as engine:
            answers[kernels] = [each.tokens for each in generate(engine, asked)]
            assert engine.stats().compiles_after_warmup == 0
            assert {kind.attention_backend for kind in engine._runner._kinds} == {kernels}
    assert answers["tpu"] == answers["reference"]
    assert len({*answers["tpu"][1]}) > 1  # no constant that anything would answer


def test_kernels_that_serve_an_engine_say_nothing(on_tpu, caplog):
    with caplog.at_level("INFO"):
        check_kernels(caches("tpu", **BUDGET), 1)
        check_kernels(caches("auto"), 1)
    assert not caplog.records


def test_kernels_by_name_that_do_not_serve_end_the_start_before_weights_are_read(on_tpu, tmp_path):
    folder = tiny.write(tmp_path)
    with pytest.raises(ValueError, match=r"kernels='tpu' do not serve this engine: .*sliding window of 100.*decode"):
        Engine.from_pretrained(folder, config("tpu"))
    Engine.from_pretrained(folder, config("auto"))
    Engine.from_pretrained(folder, config("reference"))


def test_what_auto_leaves_to_the_reference_is_logged_once(on_tpu, caplog):
    with caplog.at_level("INFO"):
        check_kernels(caches("auto", tiny.CONFIG), 1)
    [record] = caplog.records
    assert "a sliding window of 100" in record.getMessage()
    assert "(decode)" in record.getMessage()


@pytest.mark.parametrize(
    ("platform", "capability", "asked", "settled"),
    [
        ("cpu", None, "auto", "reference"),
        ("tpu", None, "auto", "auto"),
        ("tpu", None, "tpu", "tpu"),
        ("gpu", "9.0", "auto", "auto"),
        ("gpu", "9.0", "gpu", "gpu"),
        ("gpu", "8.0", "auto", "reference"),
        ("gpu", "8.0", "reference", "reference"),
        ("gpu", "8.0", "gpu", "compute capability 8.0, and the kernels are for 9.0"),
        ("gpu", "9.0", "tpu", "kernels='tpu' run on a TPU and not on a GPU"),
        ("cpu", None, "gpu", "kernels='gpu' run on a GPU and not on a CPU"),
    ],
)
def test_kernels_are_for_the_devices_that_are_here(monkeypatch, platform, capability, asked, settled):
    device = types.SimpleNamespace(device_kind="a device", **({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    refused = settled not in ("reference", "auto", asked)
    with pytest.raises(ValueError, match=settled) if refused else contextlib.nullcontext():
        assert settle(ResolvedConfig.resolve(config(asked), 256, platform)).attention_backend == settled


def test_kernels_are_a_part_of_what_stored_kv_is_found_by(tmp_path):
    """Another implementation rounds in another way; what was stored before there was a choice is still found."""
    folder = tiny.write(tmp_path)
    numerics = {kernels: namespace(folder, caches(kernels), 1).numerics for kernels in ("reference", "auto", "tpu")}
    assert len({*numerics.values()}) == 3
    assert "kernels" not in numerics["reference"]
    one, other = (identity(folder, caches(kernels)) for kernels in ("reference", "tpu"))
    assert {name for name in one if one[name] != other[name]} == {"numerics"}
