"""How many tokens of KV each layer keeps and reads: frozen, hashable, and therefore static to jit."""

from kvjax.budget.fingerprint import ModelFingerprint
from kvjax.budget.layer import LayerBudget
from kvjax.budget.profile import MAX_GROUP_LAYERS, BudgetProfile
from kvjax.budget.split import adaptive_split

__all__ = ["MAX_GROUP_LAYERS", "BudgetProfile", "LayerBudget", "ModelFingerprint", "adaptive_split"]
