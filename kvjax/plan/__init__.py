"""Capacity planning: memory and rooflines of a model on a device that is not here, from its config alone."""

from kvjax.plan.deployment import Deployment
from kvjax.plan.devices import CHIPS, Chip, Device, find_device
from kvjax.plan.estimate import EnginePlan, Estimate, estimate
from kvjax.plan.loading import Load, TierRate

__all__ = [
    "CHIPS",
    "Chip",
    "Deployment",
    "Device",
    "EnginePlan",
    "Estimate",
    "Load",
    "TierRate",
    "estimate",
    "find_device",
]
