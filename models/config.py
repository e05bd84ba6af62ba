"""Decoder configuration: frozen, hashable data from which shapes and shardings derive. No arrays, no files."""

import dataclasses
from typing import Literal

from kvjax.models.rope import RopeConfig

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer. Layers with equal configs share one compiled body.

    Attributes:
        rope: position encoding (Gemma 3 has a local and a scaled global one).
        window: sliding window in tokens: position p sees keys in (p - window, p]; None sees all of them.
    """

    rope: RopeConfig
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, must be at least 1 or None for a global layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer, whatever family it came from.

    Attributes:
        family: the Hugging Face `model_type` whose checkpoint format it uses.
        width: model width E; mlp_width: F.
        query_scale: what scores are multiplied with before the softmax.
        qk_norm: RMS norm of each query and key head before the rotation.
        post_norms: also normalise what attention and MLP return, before the residual sum (Gemma).
        norm_plus_one: norms multiply with 1 + weight (Gemma).
        embed_scale: what embeddings are multiplied with, rounded to their dtype; None for nothing.
        tied: the embedding is the output matrix too.
        max_position: context in tokens that the checkpoint claims, or that its YaRN stretches it to.
        eos_token_ids: any of these ends a text.

    Raises:
        ValueError: sizes that do not fit together; names the value and the bound.
    """

    family: str
    vocab_size: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    query_scale: float
    norm_eps: float
    max_position: int
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    embed_scale: float | None = None
    tied: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "width",
            "mlp_width",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not self.layers:
            raise ValueError("a decoder needs at least one layer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        for layer in self.layers:
            if layer.rope.dim > self.head_dim:
                raise ValueError(f"rope turns {layer.rope.dim} dimensions of a head of {self.head_dim}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head (G)."""
        return self.num_heads // self.num_kv_heads
