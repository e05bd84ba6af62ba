"""Estimate of a deployment: memory, conversations that fit, and rooflines, with the full cache and with a budget.

Every byte comes from the engine's own declarations (`CacheConfig`, `memory.plan`), never from a formula written twice.
"""

import dataclasses
from collections.abc import Mapping

from kvjax import cache
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import most_slots, plan
from kvjax.engine.startup.report import keeps
from kvjax.models.sharding import check_mesh
from kvjax.plan.deployment import Deployment
from kvjax.plan.loading import Prefix, prefix
from kvjax.plan.roofline import DecodeStep, decode_step


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """Memory and decode step of an engine with one method.

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
class CompiledSteps:
    """An engine's largest steps as a device's compiler lays them out.

    Attributes:
        temporaries: bytes on each device by step.
        refused: the reason for each step that it did not compile: arguments and temporaries that do not fit, mostly.
    """

    temporaries: Mapping[str, int]
    refused: Mapping[str, str]

    @property
    def largest(self) -> int:
        return max(self.temporaries.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The full cache beside the deployment's method.

    Attributes:
        full: an engine that keeps everything.
        compressed: the engine of the deployment's method; None if that is the full cache.
        compiled: temporaries of the requested engine, as the device's compiler counts them; where None, `uncompiled`
            is the reason, and the temporaries of `memory` are all there are.
    """

    deployment: Deployment
    layout: ResolvedConfig
    full: EnginePlan
    compressed: EnginePlan | None
    prefix: Prefix
    compiled: CompiledSteps | None = None
    uncompiled: str = "not requested"

    @property
    def requested(self) -> EnginePlan:
        """The engine of the deployment's method, whichever it is."""
        return self.compressed or self.full

    @property
    def ratio(self) -> float:
        """Seconds of the full cache's decode step over those of the requested engine, by the rooflines."""
        return self.full.step.seconds / self.requested.step.seconds


def estimate(deployment: Deployment) -> Estimate:
    """Estimates a deployment; nothing is allocated and nothing runs.

    Raises:
        ValueError: the model cannot be split over the device's chips, the context is longer than the model's, or the
            budget fits no method; says what would do.
    """
    _check_parts(deployment)
    caches = deployment.declare()
    full = caches
    if caches.layout.method != "full":
        uncompressed = {"method": None, "token_budget": None, "budgets": None, "group_layers": None}
        config = dataclasses.replace(deployment.config, **uncompressed)
        full = dataclasses.replace(deployment, config=config).declare()
    return Estimate(
        deployment,
        caches.layout,
        _engine(deployment, full),
        None if caches is full else _engine(deployment, caches),
        prefix(caches, deployment.device, deployment.tiers),
    )


def _engine(deployment: Deployment, caches: CacheConfig) -> EnginePlan:
    mesh = deployment.device.mesh
    memory = plan(caches, mesh)
    summaries = cache.nbytes([view.bounds for view in caches.views], mesh)
    parts = {"weights": memory["weights"], "views": memory["views"] - summaries, "page summaries": summaries}
    a_slot = max(
        1, memory["views"] // caches.layout.max_num_seqs
    )  # slots beyond what their views alone allow cannot fit
    most = most_slots(caches.model, caches.layout, deployment.free, deployment.free // a_slot, mesh)
    return EnginePlan(
        keeps(caches),
        parts | {purpose: nbytes for purpose, nbytes in memory.items() if purpose not in parts},
        sum(memory.values()) <= deployment.free,
        most,
        decode_step(caches, deployment.device),
    )


def _check_parts(deployment: Deployment) -> None:
    device = deployment.device
    if device.mesh is None:
        return
    try:
        check_mesh(deployment.model, device.mesh)
    except ValueError as error:
        raise ValueError(f"device {device.name!r} has {device.parts} parts: {error}") from None
