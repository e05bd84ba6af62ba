"""Runs an implementation on the CPU: kernels in the interpreter of their platform, with the search for races on."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu


@contextlib.contextmanager
def interpreted(implementation: str) -> Iterator[None]:
    """Kernels that run inside do so in the interpreter; a race in the last of them is an error."""
    if implementation == "tpu":
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
        assert tpu_interpreter.races is None or not tpu_interpreter.races.races_found, "a race"
    elif implementation == "gpu":
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert gpu_interpreter._races is None or not gpu_interpreter._races.races_found, "a race"
    else:
        yield


def run(implementation: str, operation: Callable[..., Any], *arguments: Any, **options: Any) -> np.ndarray:
    """The output of an operation by one of its implementations, as float32."""
    with interpreted(implementation):
        compiled = jax.jit(functools.partial(operation, implementation=implementation, **options))
        return np.asarray(compiled(*arguments)).astype(np.float32)
