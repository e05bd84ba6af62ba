"""Token budgets: the KV tokens that each layer keeps and reads. Frozen and hashable, so static to jit."""

from kvjax.budget.fingerprint import ModelFingerprint
from kvjax.budget.layer import LayerBudget, Options, OptionValue, sorted_options
from kvjax.budget.profile import MAX_GROUP_LAYERS, BudgetProfile
from kvjax.budget.split import LEAST_TOKEN_BUDGET, adaptive_split, stage2_split

__all__ = [
    "LEAST_TOKEN_BUDGET",
    "MAX_GROUP_LAYERS",
    "BudgetProfile",
    "LayerBudget",
    "ModelFingerprint",
    "OptionValue",
    "Options",
    "adaptive_split",
    "sorted_options",
    "stage2_split",
]
