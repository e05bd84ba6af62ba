"""A race in a kernel is seen: without that, every test of a kernel would prove less than it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from tests.pallas.interpreter import run


def tpu_copy(x, *, implementation, waits):
    """Copies by way of VMEM; without the wait the copy may be read before it is there."""

    def kernel(source, out, buffer, arrived):
        copy = pltpu.make_async_copy(source, buffer, arrived)
        copy.start()
        if waits:
            copy.wait()
        out[...] = buffer[...]
        if not waits:
            copy.wait()

    return pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)


def gpu_copy(x, *, implementation, waits):
    """Copies by way of shared memory; without the wait the copy may be read before it is there."""

    def kernel(source, out, buffer, arrived):
        plgpu.copy_gmem_to_smem(source, buffer, arrived)
        if waits:
            plgpu.barrier_wait(arrived)
        out[...] = buffer[...] + 1
        if not waits:
            plgpu.barrier_wait(arrived)

    scratch = [plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()]
    return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), scratch_types=scratch)(x) - 1


@pytest.mark.parametrize(("implementation", "copy"), [("tpu", tpu_copy), ("gpu", gpu_copy)])
def test_a_race_is_an_error(implementation, copy):
    x = jnp.arange(8 * 128, dtype=jnp.float32).reshape(8, 128)
    np.testing.assert_array_equal(run(implementation, functools.partial(copy, waits=True), x), x)
    with pytest.raises(AssertionError, match="a race"):
        run(implementation, functools.partial(copy, waits=False), x)
    np.testing.assert_array_equal(run(implementation, functools.partial(copy, waits=True), x), x)
