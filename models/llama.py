"""Llama 3.x, and the tensor names that most families share."""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.family import Family, HFConfig

KEYS: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.*.input_layernorm.weight": "layers.*.attention_norm.weight",
    "model.layers.*.self_attn.q_proj.weight": "layers.*.attention.query",
    "model.layers.*.self_attn.k_proj.weight": "layers.*.attention.key",
    "model.layers.*.self_attn.v_proj.weight": "layers.*.attention.value",
    "model.layers.*.self_attn.o_proj.weight": "layers.*.attention.output",
    "model.layers.*.self_attn.q_proj.bias": "layers.*.attention.query_bias",
    "model.layers.*.self_attn.k_proj.bias": "layers.*.attention.key_bias",
    "model.layers.*.self_attn.v_proj.bias": "layers.*.attention.value_bias",
    "model.layers.*.self_attn.o_proj.bias": "layers.*.attention.output_bias",
    "model.layers.*.post_attention_layernorm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.mlp.gate_proj.weight": "layers.*.mlp.gate",
    "model.layers.*.mlp.up_proj.weight": "layers.*.mlp.up",
    "model.layers.*.mlp.down_proj.weight": "layers.*.mlp.down",
    "model.layers.*.mlp.gate_proj.bias": "layers.*.mlp.gate_bias",
    "model.layers.*.mlp.up_proj.bias": "layers.*.mlp.up_bias",
    "model.layers.*.mlp.down_proj.bias": "layers.*.mlp.down_bias",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "unembedding",
}


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    depth, bias = common.need(hf, "num_hidden_layers"), bool(hf.get("attention_bias"))
    common.refuse(hf, {"layer_types": (None, [common.FULL] * depth)})
    layers = [LayerConfig(common.rope(hf, max_model_len))] * depth
    mlp_bias = bool(hf.get("mlp_bias"))
    hf = dict(hf) | {"mlp_bias": False}  # which the other families refuse
    return common.decoder_config(hf, "llama", layers, qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common.to_hf(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family("llama", "LlamaForCausalLM", from_hf, to_hf, KEYS)
