"""Accelerators by their published figures: memory, its bandwidth, arithmetic, and the link to the host."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import AbstractMesh

from kvjax.cache import TENSOR

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as its maker describes it.

    Attributes:
        platform: JAX's name for such devices: "gpu" or "tpu".
        memory: bytes of HBM. Makers write GB for powers of two here; drivers keep a hundredth for themselves.
        bandwidth: bytes a second between it and the cores.
        flops: bfloat16 operations a second, dense, a multiplication and an addition counted as two.
        host_link: bytes a second from the host's memory, one way.
        devices: how many devices JAX sees in it; each has an equal part of everything.
    """

    platform: str
    memory: int
    bandwidth: float
    flops: float
    host_link: float
    devices: int = 1


# GPUs: the data sheets at nvidia.com of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200 (an eighth of it); where a sheet
# gives arithmetic with sparsity, half of that. Their links are 16 lanes of PCIe 4 (32 GB/s) or 5 (64 GB/s) each way.
# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x. Google publishes no bandwidth of the link to the host but for
# v4's 16 GB/s (jax-ml.github.io/scaling-book/tpus), taken for v5e and v5p too; v6e has PCIe 5, taken as 8 lanes, and
# so is tpu7x. --host-bandwidth overrides them.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "a100": Chip("gpu", 80 * GIB, 2.039e12, 312e12, 32e9),
        "h100": Chip("gpu", 80 * GIB, 3.35e12, 989e12, 64e9),
        "h200": Chip("gpu", 141 * GIB, 4.8e12, 989e12, 64e9),
        "b200": Chip("gpu", 180 * GIB, 8e12, 2250e12, 64e9),
        "v5e": Chip("tpu", 16 * GIB, 819e9, 197e12, 16e9),
        "v5p": Chip("tpu", 95 * GIB, 2.765e12, 459e12, 16e9),
        "v6e": Chip("tpu", 32 * GIB, 1.638e12, 918e12, 32e9),
        "tpu7x": Chip("tpu", 192 * GIB, 7.38e12, 2307e12, 32e9, devices=2),
    }
)


@dataclasses.dataclass(frozen=True)
class Device:
    """Several chips of a kind, over whose JAX devices a model is split by heads, as `models.sharding` does.

    Attributes:
        name: as on the command line: "h200", "v5e-8".
        chips: how many.
    """

    name: str
    chip: Chip
    chips: int

    @property
    def parts(self) -> int:
        """JAX devices of all chips: the tensor-parallel size."""
        return self.chips * self.chip.devices

    @property
    def memory(self) -> int:
        """Bytes of HBM of one JAX device; the rates below are of one, too."""
        return self.chip.memory // self.chip.devices

    @property
    def bandwidth(self) -> float:
        return self.chip.bandwidth / self.chip.devices

    @property
    def flops(self) -> float:
        return self.chip.flops / self.chip.devices

    @property
    def mesh(self) -> AbstractMesh | None:
        """The mesh that arrays are split over; None for a single JAX device."""
        return None if self.parts == 1 else AbstractMesh((self.parts,), (TENSOR,))


def find_device(name: str) -> Device:
    """The device of that name: a chip's, or `v5e-8` for eight of them.

    Raises:
        ValueError: it is not known; lists those that are.
    """
    match = re.fullmatch(r"(\w+?)(?:-([1-9][0-9]*))?", name.lower())
    if match is None or match[1] not in CHIPS:
        raise ValueError(f"device {name!r} is not known: one of {', '.join(CHIPS)}, or several, as in v5e-8 or h200-2")
    return Device(name.lower(), CHIPS[match[1]], int(match[2] or 1))
