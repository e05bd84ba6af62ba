"""What a model takes and could do on a device that is not here: from its config alone, before anything is bought."""

from kvjax.plan.devices import CHIPS, Chip, Device, find_device
from kvjax.plan.estimate import Estimate, PlanQuestion, Side, estimate
from kvjax.plan.loading import Load, TierRate

__all__ = ["CHIPS", "Chip", "Device", "Estimate", "Load", "PlanQuestion", "Side", "TierRate", "estimate", "find_device"]
