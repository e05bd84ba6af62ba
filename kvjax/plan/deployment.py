"""Deployment: a model, a device and an engine config, whose memory and speed are to be estimated."""

import dataclasses

from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import DecoderConfig
from kvjax.plan.devices import Device
from kvjax.plan.loading import TierRate

SHARE = 0.9  # of a device's memory; the rest is for its runtime, compiled steps and what fragments
DISK, REMOTE = 7e9, 1.25e9  # bytes a second: an NVMe drive on 4 lanes of PCIe 4, and a network of 10 Gbit/s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model, an engine config, and the device that is to serve them.

    Attributes:
        config: of the engine; its tensor-parallel size is the device's.
        share: of the device's memory that the engine may take.
        host_bandwidth: bytes a second from host memory to all devices; None is the published rate of the links.
        disk_bandwidth, remote_bandwidth: bytes a second from there to host memory.

    Raises:
        ValueError: a share outside (0, 1].
    """

    model: DecoderConfig
    device: Device
    config: EngineConfig
    share: float = SHARE
    host_bandwidth: float | None = None
    disk_bandwidth: float = DISK
    remote_bandwidth: float = REMOTE

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"--gpu-memory-utilization {self.share:g} must be above 0 and at most 1, as 0.9")

    @property
    def tiers(self) -> tuple[TierRate, ...]:
        host = self.host_bandwidth
        if host is None:
            host = self.device.chip.host_link * self.device.chips
        return TierRate("host", host), TierRate("disk", self.disk_bandwidth), TierRate("remote", self.remote_bandwidth)

    @property
    def free(self) -> int:
        """Bytes that the engine may take of each device."""
        return int(self.share * self.device.memory)

    def declare(self) -> CacheConfig:
        """The caches of the engine."""
        layout = ResolvedConfig.resolve(self.config, self.model.max_position, self.device.chip.platform)
        return CacheConfig.declare(self.model, layout)
