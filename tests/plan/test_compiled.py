"""Temporaries as compilers of devices that are not here count them, for the engine's own steps."""

import pytest

from kvjax.plan import find_device
from kvjax.plan.compiled import measure
from kvjax.plan.topology import why_not

SMALL = ("models/kvjax_small", "--token-budget", "64", "--context", "2048", "--device")


@pytest.mark.aot
@pytest.mark.slow  # half a minute a device
@pytest.mark.parametrize("device", ["v5e", "v6e-2", "h200"])
def test_the_engines_steps_compile(device):
    assert why_not(find_device(device)) is None
    compiled = measure([*SMALL, device])
    assert not compiled.refused
    assert compiled.temporaries.keys() == {"prefill", "install", "decode"}
    assert 0 < compiled.largest < 1 << 30


@pytest.mark.aot
def test_what_ends_the_compiler_is_said():
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1: .*'h300' is not known"):
        measure([*SMALL, "h300"])


def test_a_device_without_a_description_is_said():
    assert why_not(find_device("b200")) == "no description of b200 for its compiler"
    assert why_not(find_device("h200-2")) == "no description of h200-2 for its compiler"
    assert why_not(find_device("v5e-64")) == "no topology of 64 chips"
