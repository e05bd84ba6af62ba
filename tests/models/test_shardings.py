"""Sharding: whole heads and slices of MLP and vocabulary a device, and errors that name the flag."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kvjax import models
from kvjax.models.parameters import walk
from tests.models import tiny


def mesh(size):
    return jax.sharding.AbstractMesh((size,), ("tensor",))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_array_has_a_sharding_that_cuts_it_evenly(name):
    decoder = models.abstract(tiny.CONFIGS[name])
    shardings = models.shardings(decoder, mesh(2))
    assert jax.tree.structure(shardings) == jax.tree.structure(nnx.state(decoder))
    for (path, param), sharding in zip(walk(decoder), jax.tree.leaves(shardings), strict=True):
        cut = np.prod(param.shape) / np.prod(sharding.shard_shape(param.shape))
        whole = path.endswith("norm.weight")
        assert cut == (1 if whole else 2), path


def test_heads_stay_whole():
    decoder = models.abstract(tiny.LLAMA)
    leaves = jax.tree.leaves(models.shardings(decoder, mesh(2)))
    specs = {path: leaf.spec for (path, _), leaf in zip(walk(decoder), leaves, strict=True)}
    assert specs["layers.0.attention.query"] == PartitionSpec("tensor", None, None)
    assert specs["layers.0.attention.output"] == PartitionSpec(None, "tensor")
    assert specs["layers.2.mlp.down"] == PartitionSpec(None, "tensor")
    assert specs["embedding"] == PartitionSpec("tensor", None)


def test_an_uneven_cut_names_the_flag_the_bound_and_the_way_out():
    decoder = models.abstract(tiny.LLAMA)
    message = r"--tensor-parallel-size 4 does not divide num_kv_heads \(2\); possible: 1, 2$"
    with pytest.raises(ValueError, match=message):
        models.shardings(decoder, mesh(4))


def test_a_mesh_without_the_axis_is_refused():
    with pytest.raises(ValueError, match=r"axes \('data',\); a model is sharded over one called 'tensor'"):
        models.shardings(models.abstract(tiny.LLAMA), jax.sharding.AbstractMesh((2,), ("data",)))


PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from kvjax import models

mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
for folder in sys.argv[1:]:
    one, two = models.load(folder), models.load(folder, mesh=mesh)
    planned = jax.tree.leaves(models.shardings(two, mesh))
    leaves = jax.tree.leaves(nnx.state(two))
    assert all(leaf.sharding == sharding for leaf, sharding in zip(leaves, planned, strict=True))
    graphdef, state = nnx.split(two)
    whole = nnx.state(one)
    tokens = jnp.arange(20)[None] % one.config.vocab_size
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    np.testing.assert_allclose(forward(state, tokens), forward(whole, tokens), atol=1e-4)
    print(one.config.family)
"""


def test_a_checkpoint_loads_onto_two_devices_and_computes_the_same(tmp_path):
    folders = []
    for name in ("gemma3", "phi3"):
        models.save(tiny.decoder(name), tmp_path / name)
        folders.append(str(tmp_path / name))
    # devices are counted when a process first uses JAX, so several of them need a process of their own
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["gemma3_text", "phi3"]
