"""The families that can be loaded."""

from kvjax.models.family import Family
from kvjax.models.gemma3 import GEMMA3, GEMMA3_MULTIMODAL
from kvjax.models.llama import LLAMA
from kvjax.models.mistral import MISTRAL
from kvjax.models.phi3 import PHI3
from kvjax.models.qwen2 import QWEN2
from kvjax.models.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, GEMMA3_MULTIMODAL, PHI3)}


def find(model_type: str | None) -> Family:
    """The family of a config.json's `model_type`. Raises ValueError that lists the families there are."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
