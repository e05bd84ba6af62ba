"""Model fingerprint: the sizes and weights that tie a budget profile to a model."""

import dataclasses
from typing import Protocol, runtime_checkable


@runtime_checkable
class HasShape(Protocol):
    """What a fingerprint is taken of; `DecoderConfig` is one."""

    @property
    def family(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class ModelFingerprint:
    """What two models must share for a profile of one to mean something for the other.

    Attributes:
        family: as the configuration of the checkpoint names it (`model_type`).
        layers, kv_heads, head_dim: sizes.
        weights: digest of the checkpoint, where a profile is for these weights alone (a search's is), else None.

    Raises:
        ValueError: a size below 1, or no family.
    """

    family: str
    layers: int
    kv_heads: int
    head_dim: int
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.family:
            raise ValueError("family is empty: give the model_type of the checkpoint")
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1: take it from the model's config")

    @classmethod
    def of(cls, config: HasShape, weights: str | None = None) -> "ModelFingerprint":
        """The fingerprint of a model's configuration."""
        return cls(config.family, config.num_layers, config.num_kv_heads, config.head_dim, weights)

    def __str__(self) -> str:
        weights = f", weights {self.weights[:12]}" if self.weights else ""
        return (
            f"{self.family} with {self.layers} layers, {self.kv_heads} kv heads and heads of {self.head_dim}{weights}"
        )
