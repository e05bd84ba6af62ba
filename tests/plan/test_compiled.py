"""Temporaries as compilers of devices that are not here count them, for the engine's own steps."""

import dataclasses
import json

import pytest

from kvjax.models.families import find
from kvjax.plan import find_device
from kvjax.plan.compiled import measure
from kvjax.plan.topology import compile_obstacle
from tests.engine import tiny

SMALL = ("models/kvjax_small", "--token-budget", "64", "--context", "2048", "--device")
LARGE = ("llama-3.1-8b", "--token-budget", "1024", "--context", "131072", "--num-seqs", "8")


@pytest.mark.aot
@pytest.mark.slow  # half a minute a device
@pytest.mark.parametrize("device", ["v5e", "v6e-2", "h200"])
def test_the_engines_steps_compile(device):
    assert compile_obstacle(find_device(device)) is None
    compiled = measure([*SMALL, device])
    assert not compiled.refused
    assert compiled.temporaries.keys() == {"prefill", "install", "decode"}
    assert 0 < compiled.largest < 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config whose heads kernels serve, and can be split over four devices."""
    config = dataclasses.replace(
        tiny.LLAMA,
        vocab_size=1024,
        width=512,
        mlp_width=1024,
        num_heads=32,
        num_kv_heads=8,
        max_position=32_768,
    )
    path = tmp_path_factory.mktemp("llama")
    family = find(config.family)
    (path / "config.json").write_text(json.dumps(family.to_hf(config) | {"model_type": family.model_type}))
    return path


@pytest.mark.aot
@pytest.mark.slow  # half a minute a device
@pytest.mark.parametrize(("device", "kernels"), [("v5e-4", "tpu"), ("tpu7x", "tpu"), ("h200", "gpu")])
def test_steps_with_kernels_compile_over_one_device_and_several(folder, device, kernels):
    deployment = (str(folder), "--token-budget", "1024", "--device", device, "--attention-backend")
    compiled = measure([*deployment, kernels])
    assert not compiled.refused
    reference = measure([*deployment, "reference"])
    # a kernel that was gathered to one device would need room for all of a view
    assert compiled.temporaries["decode"] <= reference.temporaries["decode"] + (1 << 20)


@pytest.mark.aot
@pytest.mark.slow  # minutes
def test_a_large_model_decodes_over_eight_small_devices_and_copies_nothing():
    """Llama 3.1 8B and 8 conversations of 131,072 tokens, with kernels; one v5e does not hold the weights."""
    compiled = measure([*LARGE, "--device", "v5e-8", "--attention-backend", "tpu"])
    assert not compiled.refused
    rows = 32 * 8 * 2 * 128  # of one device: layers, slots, K and V or both bounds, dims
    views, summaries = rows * 6528 * 2, rows * 816
    logits = 8 * 128_256 * 4
    # summaries are brought up to date in VMEM, and sampling has the logits in several orders
    assert compiled.temporaries["decode"] < 0.02 * views + summaries + 8 * logits


@pytest.mark.aot
def test_what_ends_the_compiler_is_said():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1: .*'h300' is not known"):
        measure([*SMALL, "h300"])


def test_a_device_without_a_description_is_said():
    assert compile_obstacle(find_device("b200")) == "no description of b200 for its compiler"
    assert compile_obstacle(find_device("h200-2")) == "no description of h200-2 for its compiler"
    assert compile_obstacle(find_device("v5e-64")) == "no topology of 64 chips"
