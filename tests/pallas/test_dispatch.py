"""Dispatch of an operation to an implementation, by name or by platform."""

import types

import jax
import pytest

from kvjax.pallas.dispatch import dispatch


def refuse(x):
    raise NotImplementedError("odd numbers only")


WAYS = {"reference": lambda x: ("reference", x), "tpu": lambda x: ("tpu", x), "gpu": refuse}


@pytest.mark.parametrize(
    ("platform", "used"), [("cpu", "reference"), ("tpu", "tpu"), ("gpu", "reference"), ("METAL", "reference")]
)
def test_the_platform_decides_and_what_it_cannot_serve_falls_to_the_reference(monkeypatch, platform, used):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert dispatch("double", WAYS, None, 3) == (used, 3)


def test_a_gpu_of_another_generation_has_no_kernels(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ways = WAYS | {"gpu": lambda x: ("gpu", x)}
    for capability, used in (("9.0", "gpu"), ("8.0", "reference"), ("10.0", "reference")):
        device = types.SimpleNamespace(device_kind="a GPU", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert dispatch("double", ways, None, 3) == (used, 3)


def test_the_reason_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level("DEBUG"):
        dispatch("double", WAYS, None, 2)
    assert "double runs as jax.numpy: odd numbers only" in caplog.text


def test_a_name_is_obeyed_or_fails():
    assert dispatch("double", WAYS, "tpu", 3) == ("tpu", 3)
    with pytest.raises(NotImplementedError, match="odd numbers only"):
        dispatch("double", WAYS, "gpu", 2)
    with pytest.raises(ValueError, match="double has no implementation 'cuda': one of reference, tpu, gpu"):
        dispatch("double", WAYS, "cuda", 2)
