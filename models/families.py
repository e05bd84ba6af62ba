"""The families that can be loaded."""

from kvjax.models.family import Family
from kvjax.models.llama import LLAMA

FAMILIES = {family.model_type: family for family in (LLAMA,)}


def find(model_type: str | None) -> Family:
    """The family of a config.json's `model_type`. Raises ValueError that lists the families there are."""
    if model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; these are: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
