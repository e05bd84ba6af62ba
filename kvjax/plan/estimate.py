"""The question and the answer: a model, a device, so many conversations; what that takes, with all KV and with less.

Every byte comes from the engine's own declarations (`CacheConfig`, `memory.plan`), never from a formula written twice.
"""

import dataclasses
from collections.abc import Mapping

from kvjax import cache
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import most_slots, plan
from kvjax.engine.report import keeps
from kvjax.models import DecoderConfig
from kvjax.models.sharding import check_mesh
from kvjax.plan.devices import Device
from kvjax.plan.loading import Prefix, TierRate, prefix
from kvjax.plan.roofline import DecodeStep, decode_step

SHARE = 0.9  # of a device's memory; the rest is for its runtime, compiled steps and what fragments
DISK, REMOTE = 7e9, 1.25e9  # bytes a second: an NVMe drive on 4 lanes of PCIe 4, and a network of 10 Gbit/s


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """What is to be served, and on what.

    Attributes:
        config: of the engine; its tensor-parallel size is the device's.
        share: of the device's memory that the engine may take.
        host_bandwidth: bytes a second from host memory to all devices; None is what is known of the links.
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


@dataclasses.dataclass(frozen=True)
class Side:
    """An engine of one method.

    Attributes:
        keeps: in words, what its views keep of a context and a step reads.
        memory: bytes on each device by purpose.
        fits: whether these are free.
        most: how many conversations fit, each as long as the context; 0 if none does.
        step: the roofline of a decode step.
    """

    keeps: str
    memory: dict[str, int]
    fits: bool
    most: int
    step: DecodeStep

    @property
    def nbytes(self) -> int:
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a device's compiler said of an engine's largest steps.

    Attributes:
        temporaries: bytes on each device by step.
        refused: of a step that it did not compile, its reason: arguments and temporaries that do not fit, mostly.
    """

    temporaries: Mapping[str, int]
    refused: Mapping[str, str]

    @property
    def largest(self) -> int:
        return max(self.temporaries.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The answer. `full` keeps everything, `this` is what was asked for; None if that is the full cache.

    Attributes:
        compiled: the temporaries of what was asked for, as the device's compiler counts them; `uncompiled` says why
            there are none, and then those of `memory` are all there is.
    """

    question: PlanQuestion
    layout: ResolvedConfig
    full: Side
    this: Side | None
    prefix: Prefix
    compiled: Compiled | None = None
    uncompiled: str = "not asked for"

    @property
    def asked(self) -> Side:
        return self.this or self.full

    @property
    def ratio(self) -> float:
        """How many times longer the full cache's decode step is, by the rooflines."""
        return self.full.step.seconds / self.asked.step.seconds


def estimate(question: PlanQuestion) -> Estimate:
    """Answers a question; nothing is allocated and nothing runs.

    Raises:
        ValueError: the model cannot be split over the device's chips, the context is longer than the model's, or the
            budget fits no method; says what would do.
    """
    _check_parts(question)
    caches = declare(question)
    full = caches
    if caches.layout.method != "full":
        uncompressed = {"method": None, "token_budget": None, "budgets": None, "group_layers": None}
        full = declare(dataclasses.replace(question, config=dataclasses.replace(question.config, **uncompressed)))
    return Estimate(
        question,
        caches.layout,
        _side(question, full),
        None if caches is full else _side(question, caches),
        prefix(caches, question.device, question.tiers),
    )


def declare(question: PlanQuestion) -> CacheConfig:
    """The caches of the engine that is asked about."""
    layout = ResolvedConfig.resolve(question.config, question.model.max_position, question.device.chip.platform)
    return CacheConfig.declare(question.model, layout)


def _side(question: PlanQuestion, caches: CacheConfig) -> Side:
    mesh = question.device.mesh
    memory = plan(caches, mesh)
    summaries = cache.nbytes([view.bounds for view in caches.views], mesh)
    parts = {"weights": memory["weights"], "views": memory["views"] - summaries, "page summaries": summaries}
    a_slot = max(
        1, memory["views"] // caches.layout.max_num_seqs
    )  # slots beyond what their views alone allow cannot fit
    most = most_slots(caches.model, caches.layout, question.free, question.free // a_slot, mesh)
    return Side(
        keeps(caches),
        parts | {purpose: nbytes for purpose, nbytes in memory.items() if purpose not in parts},
        sum(memory.values()) <= question.free,
        most,
        decode_step(caches, question.device),
    )


def _check_parts(question: PlanQuestion) -> None:
    device = question.device
    if device.mesh is None:
        return
    try:
        check_mesh(question.model, device.mesh)
    except ValueError as error:
        raise ValueError(f"device {device.name!r} has {device.parts} parts: {error}") from None
