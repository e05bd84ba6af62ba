"""Qwen3: every query and key head is normalised before the rotation, and head_dim stands on its own."""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig
from kvjax.models.family import Family, HFConfig
from kvjax.models.llama import KEYS as LLAMA_KEYS
from kvjax.models.qwen2 import layers, layers_to_hf

KEYS = LLAMA_KEYS | {
    "model.layers.*.self_attn.q_norm.weight": "layers.*.attention.query_norm.weight",
    "model.layers.*.self_attn.k_norm.weight": "layers.*.attention.key_norm.weight",
}


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    hf = {"head_dim": 128} | dict(hf)
    bias = bool(hf.get("attention_bias"))
    return common.decoder_config(hf, "qwen3", layers(hf, max_model_len), qk_norm=True, qkv_bias=bias, output_bias=bias)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common.to_hf(config) | layers_to_hf(config) | {"attention_bias": config.qkv_bias}


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", from_hf, to_hf, KEYS)
