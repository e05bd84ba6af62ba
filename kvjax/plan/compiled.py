"""Temporaries of an engine's largest steps, as the device's own compiler sets them aside. Nothing is run.

The steps are the engine's, with the arrays it would pass. A process of its own compiles them: a compiler may end it.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kvjax.cache import TENSOR
from kvjax.engine.device.abstract import abstract_steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.plan.devices import Device
from kvjax.plan.estimate import CompiledSteps
from kvjax.plan.topology import ENVIRONMENT, as_if_on, topology_devices


def measure(arguments: Sequence[str]) -> CompiledSteps:
    """Compiles for the command line `arguments` of `kvjax.plan`, in a process of its own.

    Raises:
        RuntimeError: that process ended without a result; says what it printed last.
    """
    command = [sys.executable, "-m", "kvjax.plan.compiled", *arguments]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"temporaries"')]
    if not lines:
        raise RuntimeError(f"the compiler ended with {done.returncode}: {(done.stdout + done.stderr)[-400:].strip()}")
    return CompiledSteps(**json.loads(lines[-1]))


def compile_steps(caches: CacheConfig, device: Device) -> CompiledSteps:
    """Compiles in this process, which must have the environment of `topology.ENVIRONMENT`."""
    devices = topology_devices(device)
    mesh = None if device.parts == 1 else Mesh(np.array(devices), (TENSOR,))
    here: Sharding = SingleDeviceSharding(devices[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())
    platform = "cuda" if device.chip.platform == "gpu" else "tpu"
    temporaries, refused = {}, {}
    kernels = device.chip.platform if caches.layout.attention_backend == "auto" else caches.layout.attention_backend
    for name, trace in abstract_steps(caches, mesh, here, kernels, caches.layout.buckets[-1]).items():
        try:
            with as_if_on(devices[0]):
                lowered = trace().lower(lowering_platforms=(platform,))
            compiled = lowered.compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            refused[name] = str(error).splitlines()[0]
        else:
            temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    return CompiledSteps(temporaries, refused)


def main() -> None:
    """Prints one line of JSON for the command line of `kvjax.plan`."""
    from kvjax.plan.arguments import build_parser, read_deployment

    deployment = read_deployment(build_parser().parse_args())
    print(json.dumps(dataclasses.asdict(compile_steps(deployment.declare(), deployment.device))))


if __name__ == "__main__":
    main()
