"""Gemma 3, text only: sliding layers with a local rope between global ones, norms of 1 + weight on both
sides.
"""

from typing import Any

from kvjax.models import hf as common
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.family import Family, HFConfig
from kvjax.models.llama import KEYS as LLAMA_KEYS

KEYS = LLAMA_KEYS | {
    "model.layers.*.post_attention_layernorm.weight": "layers.*.attention_post_norm.weight",
    "model.layers.*.pre_feedforward_layernorm.weight": "layers.*.mlp_norm.weight",
    "model.layers.*.post_feedforward_layernorm.weight": "layers.*.mlp_post_norm.weight",
    "model.layers.*.self_attn.q_norm.weight": "layers.*.attention.query_norm.weight",
    "model.layers.*.self_attn.k_norm.weight": "layers.*.attention.key_norm.weight",
}

# published configs leave out what equals the defaults of transformers
DEFAULTS: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def ropes(hf: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope fields of the global and of the sliding layers, in today's spelling."""
    nested = hf.get("rope_parameters") or {}
    full = dict(nested.get(common.FULL) or {}) | dict(hf.get("rope_scaling") or {})
    sliding = dict(nested.get(common.SLIDING) or {})
    full.setdefault("rope_theta", hf.get("rope_theta") or 1_000_000.0)
    sliding.setdefault("rope_theta", hf.get("rope_local_base_freq") or 10_000.0)
    return full, sliding


def from_hf(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    hf = DEFAULTS | dict(hf)
    # transformers reads hidden_activation and passes hidden_act over
    hf["hidden_act"] = hf["hidden_activation"]
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    kinds = [common.SLIDING if (i + 1) % pattern else common.FULL for i in range(hf["num_hidden_layers"])]
    full, sliding = (common.rope(hf, max_model_len, parameters) for parameters in ropes(hf))
    layers = [
        LayerConfig(full if window is None else sliding, window)
        for window in common.windows(hf, kinds, common.need(hf, "sliding_window"))
    ]
    bias = bool(hf.get("attention_bias"))
    return common.decoder_config(
        hf,
        "gemma3_text",
        layers,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5,
        qk_norm=True,
        post_norms=True,
        norm_plus_one=True,
        embed_scale=hf["hidden_size"] ** 0.5,
        qkv_bias=bias,
        output_bias=bias,
    )


def from_multimodal(hf: HFConfig, max_model_len: int | None) -> DecoderConfig:
    """The text model of a checkpoint that also has a vision tower."""
    outer = {name: hf[name] for name in ("eos_token_id", "bos_token_id", "quantization_config") if hf.get(name)}
    return from_hf(dict(hf.get("text_config") or {}) | outer, max_model_len)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    fields = common.to_hf(config)
    kinds = {
        common.FULL if layer.window is None else common.SLIDING: common.rope_to_hf(layer.rope, config.head_dim)
        for layer in config.layers
    }
    return fields | {
        **common.layer_types(config),
        "rope_parameters": kinds,
        "hidden_activation": fields.pop("hidden_act"),
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "attention_bias": config.qkv_bias,
    }


GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", from_hf, to_hf, KEYS)
GEMMA3_MULTIMODAL = Family(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    from_multimodal,
    to_hf,
    KEYS,
    prefixes={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    ignored=(
        "vision_tower.",
        "model.vision_tower.",
        "multi_modal_projector.",
        "model.multi_modal_projector.",
    ),
)
