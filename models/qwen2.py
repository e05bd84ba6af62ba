"""Qwen2 and Qwen2.5: biases on queries, keys and values; the upper layers may slide."""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.family import Family, HFConfig
from kvjax.models.llama import KEYS


def layers(hf: HFConfig, max_model_len: int | None) -> list[LayerConfig]:
    """The layers of a Qwen: `max_window_layers` global ones, then sliding ones, if those are in use at
    all.
    """
    depth = common.need(hf, "num_hidden_layers")
    full, size, rope = depth, None, common.rope(hf, max_model_len)
    if hf.get("use_sliding_window"):
        full = min(hf.get("max_window_layers", 28), depth)
        size = common.window(hf, rope, hf.get("sliding_window", 4096), max_model_len)
    kinds = [common.FULL] * full + [common.SLIDING] * (depth - full)
    return [LayerConfig(rope, window) for window in common.windows(hf, kinds, size)]


def layers_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `layers`."""
    fields = common.layer_types(config)
    return fields | {"use_sliding_window": fields["sliding_window"] is not None}


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    return common.decoder_config(hf, "qwen2", layers(hf, max_model_len), qkv_bias=True)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common.to_hf(config) | layers_to_hf(config)


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", from_hf, to_hf, KEYS)
