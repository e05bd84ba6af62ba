"""Mistral: Llama with an optional sliding window in every layer."""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.family import Family, HFConfig
from kvjax.models.llama import KEYS


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    common.refuse(hf, {"attention_bias": (None, False), "layer_types": (None,)})
    # a config without the field means 4096; newer models say null
    rope = common.rope(hf, max_model_len)
    window = common.window(hf, rope, hf.get("sliding_window", 4096), max_model_len)
    layers = [LayerConfig(rope, window)] * common.need(hf, "num_hidden_layers")
    return common.decoder_config(hf, "mistral", layers)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common.to_hf(config) | {"sliding_window": config.layers[0].window}


MISTRAL = Family("mistral", "MistralForCausalLM", from_hf, to_hf, KEYS)
