"""Tests over several devices: collecting this folder gives the whole process eight CPU devices.

They stand apart because eight devices split the host's threads: a large matrix product on one of them takes a
quarter longer. `make test` runs this folder in a process of its own.
"""

import os

import jax
import pytest

DEVICES = 8

flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight devices; an error if JAX had chosen its devices before this folder was collected."""
    found = jax.devices()
    if len(found) < DEVICES:
        raise RuntimeError(f"{len(found)} devices of {DEVICES}: a test module used JAX while being imported")
    return found[:DEVICES]
