"""Phi-3, Phi-3.5 and Phi-4: fused projections, a rope that may turn part of a head, longrope for long
contexts.
"""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.family import Family, HFConfig
from kvjax.models.llama import KEYS as LLAMA_KEYS
from kvjax.models.rope import LongRope

_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

KEYS = {name: path for name, path in LLAMA_KEYS.items() if not any(part in name for part in _SPLIT)} | {
    "model.layers.*.self_attn.qkv_proj.weight": (
        "layers.*.attention.query",
        "layers.*.attention.key",
        "layers.*.attention.value",
    ),
    "model.layers.*.mlp.gate_up_proj.weight": ("layers.*.mlp.gate", "layers.*.mlp.up"),
}


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    common.refuse(hf, {"attention_bias": (None, False)})
    parameters = common.rope_parameters({"original_max_position_embeddings": 4096} | dict(hf))
    kind = parameters.pop("type", "default")
    if parameters.setdefault("rope_type", kind) in ("su", "yarn"):
        parameters["rope_type"] = "longrope"  # which had other names in the first of these models
    rope = common.rope(hf, max_model_len, parameters)
    window = common.window(hf, rope, hf.get("sliding_window"), max_model_len)
    return common.decoder_config(hf, "phi3", [LayerConfig(rope, window)] * common.need(hf, "num_hidden_layers"))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.layers[0].rope.scaling
    # transformers prefers this field to the one within rope_parameters
    original = (
        {"original_max_position_embeddings": scaling.original_max_position_embeddings}
        if isinstance(scaling, LongRope)
        else {}
    )
    return common.to_hf(config) | {"sliding_window": config.layers[0].window} | original


PHI3 = Family("phi3", "Phi3ForCausalLM", from_hf, to_hf, KEYS)
