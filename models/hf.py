"""Reads and writes what the config.json files of all families have in common.

Both spellings of rope are read: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`
(older). A field that changes the arithmetic and is not implemented is refused by name, never passed over.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvjax.models.config import Activation, DecoderConfig, LayerConfig
from kvjax.models.family import HFConfig
from kvjax.models.rope import Linear, Llama3, LongRope, RopeConfig, Yarn

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_SCALINGS: dict[str, type[Any]] = {
    "linear": Linear,
    "llama3": Llama3,
    "yarn": Yarn,
    "longrope": LongRope,
}

# fields of a rope type that transformers reads and that change nothing: YaRN's `finetuned`, a factor of no scaling
_UNUSED: dict[str, tuple[str, ...]] = {"yarn": ("finetuned",), "default": ("factor",)}
# `max_position_embeddings` of a config that leaves it out, as transformers has it
_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768, "phi3": 4096}

FULL, SLIDING = "full_attention", "sliding_attention"

# fields of config.json that change the arithmetic, and the values under which they do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "mlp_bias": (None, False),
    "lm_head_bias": (None, False),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
}


def need(hf: HFConfig, name: str) -> Any:
    """A field that has no default. Raises ValueError if it is not there."""
    if hf.get(name) is None:
        raise ValueError(f"config.json of a {hf.get('model_type')!r} model has no {name!r}")
    return hf[name]


def claimed_positions(hf: HFConfig) -> int:
    """`max_position_embeddings`, or its default in the family. Raises ValueError if there is neither."""
    if hf.get("max_position_embeddings") is None and hf.get("model_type") in _POSITIONS:
        return _POSITIONS[hf["model_type"]]
    return need(hf, "max_position_embeddings")


def context(hf: HFConfig, ropes: Iterable[RopeConfig]) -> int:
    """Tokens that the model can read: what the config claims, or factor x original of YaRN if that is more.

    Model cards add YaRN to a config and leave `max_position_embeddings` at the original context.
    """
    stretched = [
        int(rope.scaling.factor * rope.scaling.original_max_position_embeddings)
        for rope in ropes
        if isinstance(rope.scaling, Yarn)
    ]
    return max(claimed_positions(hf), *stretched, 0)


def refuse(hf: HFConfig, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError for a field of `neutral` with any but its neutral values."""
    for name, values in neutral.items():
        if hf.get(name) not in values:
            raise ValueError(f"config.json sets {name!r} to {hf[name]!r}; only {values[-1]!r} is implemented")


def ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids that a config gives as one, as several or not at all."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def head_dim(hf: HFConfig) -> int:
    """Dimensions of a head, which a config gives or implies."""
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    if hf.get("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size ({width}) is not a multiple of num_attention_heads ({heads}); set head_dim")
    return hf.get("head_dim") or width // heads


def rope_parameters(hf: HFConfig) -> dict[str, Any]:
    """The rope fields in today's spelling, whichever `hf` uses."""
    parameters = dict(hf.get("rope_parameters") or {}) | dict(hf.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", hf.get("rope_theta") or 10_000.0)
    for name in ("partial_rotary_factor", "original_max_position_embeddings"):
        if hf.get(name) is not None:
            parameters[name] = hf[name]
    return parameters


def rope(hf: HFConfig, max_model_len: int | None = None, parameters: Mapping[str, Any] | None = None) -> RopeConfig:
    """The position encoding of a config, from `parameters` (in today's spelling) or else from its own fields.

    Raises ValueError for a type or a field that is not implemented.
    """
    max_position = claimed_positions(hf)
    parameters = rope_parameters(hf) if parameters is None else parameters
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in parameters.items()
        if value is not None
    }
    old_spelling = given.pop("type", "default")
    kind = given.pop("rope_type", old_spelling)
    theta = float(given.pop("rope_theta"))
    dim = int(head_dim(hf) * given.pop("partial_rotary_factor", 1.0))
    original = given.pop("original_max_position_embeddings", max_position)
    if kind == "dynamic":
        raise ValueError(
            "rope_type 'dynamic' changes every frequency as a text grows, which makes cached keys wrong; "
            "use a static type: linear, llama3, yarn or longrope"
        )
    if kind != "default" and kind not in _SCALINGS:
        raise ValueError(f"rope_type {kind!r} is not implemented; these are: default, {', '.join(_SCALINGS)}")
    for name in _UNUSED.get(kind, ()):
        given.pop(name, None)
    scaling = _SCALINGS.get(kind)
    fields = {field.name for field in dataclasses.fields(scaling)} - {"use_long"} if scaling else set()
    if unknown := sorted(set(given) - fields):
        raise ValueError(f"rope_type {kind!r} with {', '.join(unknown)} is not implemented")
    if scaling is None:
        return RopeConfig(dim, theta)
    if "original_max_position_embeddings" in fields:
        given["original_max_position_embeddings"] = original
    if scaling in (Yarn, LongRope):
        given.setdefault("factor", max_position / original)
    if scaling is LongRope:
        given["use_long"] = (max_model_len or max_position) > original
    try:
        return RopeConfig(dim, theta, scaling(**given))
    except TypeError as error:
        raise ValueError(f"rope_type {kind!r} is incomplete: {error}") from None


def rope_to_hf(config: RopeConfig, head_dim: int) -> dict[str, Any]:
    """The inverse of `rope`."""
    partial = {} if config.dim == head_dim else {"partial_rotary_factor": config.dim / head_dim}
    if config.scaling is None:
        return {"rope_type": "default", "rope_theta": config.theta, **partial}
    name = next(name for name, kind in _SCALINGS.items() if isinstance(config.scaling, kind))
    fields = {k: v for k, v in dataclasses.asdict(config.scaling).items() if v is not None and k != "use_long"}
    return {"rope_type": name, "rope_theta": config.theta, **partial, **fields}


def window(hf: HFConfig, rope: RopeConfig, size: int | None, max_model_len: int | None) -> int | None:
    """A sliding window of `size` tokens, or None if no text outgrows it and the layer is as good as global."""
    longest = max(context(hf, [rope]), max_model_len or 0)
    return None if size is None or size >= longest else size


def windows(hf: HFConfig, kinds: Sequence[str], size: int | None) -> tuple[int | None, ...]:
    """The window of each layer: of kinds `layer_types` if the config has it, else `kinds`.

    Raises ValueError for a kind of layer that is not implemented.
    """
    depth = len(kinds)
    kinds = hf.get("layer_types") or kinds
    if len(kinds) != depth:
        raise ValueError(f"config.json has {len(kinds)} layer_types for {depth} layers")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise ValueError(f"layer type {kind!r} is not implemented; these are: {FULL}, {SLIDING}")
    return tuple(size if kind == SLIDING else None for kind in kinds)


def layer_types(config: DecoderConfig) -> dict[str, Any]:
    """The fields that say which layers slide, for families where they may differ."""
    sizes = {layer.window for layer in config.layers} - {None}
    return {
        "sliding_window": next(iter(sizes), None),
        "layer_types": [FULL if layer.window is None else SLIDING for layer in config.layers],
    }


def decoder_config(hf: HFConfig, family: str, layers: Iterable[LayerConfig], **changes: Any) -> DecoderConfig:
    """A `DecoderConfig` from the fields every family has; `changes` are what the family does its own way."""
    layers = tuple(layers)
    refuse(hf, _NEUTRAL)
    activation = hf.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not implemented; these are: {', '.join(_ACTIVATIONS)}")
    heads = need(hf, "num_attention_heads")
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": need(hf, "vocab_size"),
        "width": need(hf, "hidden_size"),
        "mlp_width": need(hf, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim(hf),
        "layers": layers,
        "query_scale": head_dim(hf) ** -0.5,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "max_position": context(hf, (layer.rope for layer in layers)),
        "activation": _ACTIVATIONS[activation],
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "bos_token_id": hf.get("bos_token_id"),
        "eos_token_ids": ids(hf.get("eos_token_id")),
    }
    return DecoderConfig(**(fields | changes))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The fields every family has; the inverse of `decoder_config`."""
    activation = next(name for name, value in _ACTIVATIONS.items() if value == config.activation)
    eos = config.eos_token_ids
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_to_hf(config.layers[0].rope, config.head_dim),
        "tie_word_embeddings": config.tied,
        "pad_token_id": None,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
