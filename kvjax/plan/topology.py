"""Topologies: devices that are not here, for their real compilers. Needs the extra `aot`."""

import contextlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from kvjax.plan.devices import Device

# of the CUDA driver's properties of the card; without the versions XLA takes it for a driver that captures no kernel
# of ours in a command buffer
H200 = """
gpu_device_info {
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
"""
# what compiling without the device needs to be set before JAX is imported
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)
_SHAPES = {"v5e": "{}x{}", "v6e": "{}x{}", "v5p": "{}x{}x{}", "tpu7x": "{}x{}x{}"}
_FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4)}
_DEEP = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4)}


def compile_obstacle(device: Device) -> str | None:
    """The reason why nothing can be compiled for a device here; None if it can."""
    chip = device.name.split("-")[0]
    if device.chip.platform == "gpu":
        if (chip, device.chips) != ("h200", 1):
            return f"no description of {device.name} for its compiler"
        return None if _there("jax_plugins.xla_cuda13") else 'compiling for it needs pip install "kvjax[aot]"'
    if device.chips > max(_FLAT):
        return f"no topology of {device.chips} chips"
    return None if _there("libtpu") else 'compiling for it needs pip install "kvjax[aot]"'


def topology_devices(device: Device) -> list[Any]:
    """JAX devices that can be compiled for and nothing else. Call only where `compile_obstacle` is None."""
    from jax.experimental import topologies

    if device.chip.platform == "gpu":
        return topologies.get_topology_desc("", platform="cuda", target_config=H200, topology="1x1x1").devices
    chip = device.name.split("-")[0]
    chips = min(count for count in _FLAT if count >= device.chips)
    shape = _SHAPES[chip].format(*(_FLAT if _SHAPES[chip].count("{") == 2 else _DEEP)[chips])
    return topologies.get_topology_desc(f"{chip}:{shape}", platform="tpu").devices[: device.parts]


def as_if_on(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Kernels for a TPU ask which one it is, while they are traced and lowered: this one."""
    if device.platform != "tpu":
        return contextlib.nullcontext()
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=getattr(device, "num_cores", 1), platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
