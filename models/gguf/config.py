"""GGUF metadata as the config.json of a Hugging Face checkpoint, one function an architecture.

llama.cpp names an architecture's fields `llama.block_count` and so on. Every one of them is either read here or
known to be without effect: an unknown field of the architecture is refused by name, for it may change the arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvjax.models.gguf.reader import GGUFFile
from kvjax.models.hf import FULL, SLIDING

ARCHITECTURE = "general.architecture"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"
ROPE_SHORT, ROPE_LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# tensors of factors, which are part of the configuration and of no layer
FACTORS = (ROPE_FREQUENCIES, ROPE_SHORT, ROPE_LONG)
# control tokens that end a turn, whatever the metadata calls the end of the sequence; llama.cpp goes by these texts too
TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)
CONTROL = 3  # the type of such tokens

_LARGEST = 1 << 24  # of any width, count of heads or layers
_GEMMA_27B_LAYERS = 62
# fields that are read below, as suffixes of `llama.`
_READ = {
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# without effect on these architectures
_UNUSED = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
# fields that change the arithmetic, and the values under which they do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.shared_kv_layers": (0,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The fields of a config.json that says what this file says.

    Raises:
        ValueError: an architecture or a field that is not implemented, or sizes that cannot be; says which.
    """
    architecture = file.text(ARCHITECTURE)
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise file.fault(f"is a model of architecture {architecture!r}; these are implemented: {known}")
    _refuse(file, architecture)
    return ARCHITECTURES[architecture](file, _common(file, architecture))


def eos_token_ids(file: GGUFFile) -> list[int]:
    """Tokens that end a text or a turn, the file's own first; at most eight."""
    named = ("eos", "eot", "eom")
    ids = [token for each in named if (token := token_id(file, each)) is not None]
    if "tokenizer.ggml.tokens" in file.metadata and "tokenizer.ggml.token_type" in file.metadata:
        tokens, kinds = file.texts("tokenizer.ggml.tokens"), file.numbers("tokenizer.ggml.token_type")
        ends = set(TURN_ENDS)
        ids += [
            i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL and text in ends
        ]
    return list(dict.fromkeys(ids))[:8]


def token_id(file: GGUFFile, name: str) -> int | None:
    """The id of a special token (`bos`, `eos`, `unknown` ...); None if the file names none.

    Raises ValueError for an id that the model has no row for.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    token, rows = file.integer(key), _rows(file)
    if not 0 <= token < rows:
        raise file.fault(f"has {token} as {key!r}; the model has tokens 0 to {rows - 1}")
    return token


def _rows(file: GGUFFile) -> int:
    if EMBEDDING not in file.tensors:
        raise file.fault(f"has no tensor {EMBEDDING!r}: it is no language model")
    return file.tensors[EMBEDDING].shape[0]


def _refuse(file: GGUFFile, architecture: str) -> None:
    """Raises ValueError for a field of the architecture that is not read here and may change the arithmetic."""
    for key, value in file.metadata.items():
        prefix, _, field = key.partition(".")
        if prefix != architecture or field in _READ or field in _UNUSED:
            continue
        neutral = _NEUTRAL.get(field)
        if neutral is None:
            raise file.fault(f"has the field {key!r}, which is not implemented")
        if not isinstance(value, int | float) or value not in neutral:
            raise file.fault(f"has {value!r:.60} as {key!r}; only {neutral[-1]!r} is implemented")


def _common(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The fields every architecture has."""

    def size(field: str, default: int | None = None, largest: int = _LARGEST) -> int:
        key = f"{architecture}.{field}"
        value = file.integer(key, default)
        if not 1 <= value <= largest:
            raise file.fault(f"has {value} as {key!r}; 1 to {largest} are possible")
        return value

    rows, width = _rows(file), size("embedding_length")
    layers, heads = size("block_count", largest=len(file.tensors)), size("attention.head_count")
    context = size("context_length", largest=(1 << 31) - 1)
    if f"{architecture}.attention.key_length" in file.metadata:
        head_dim = size("attention.key_length")
    elif width % heads:
        raise file.fault(f"has embedding_length {width}, which is no multiple of its {heads} heads")
    else:
        head_dim = width // heads
    if size("attention.value_length", head_dim) != head_dim:
        raise file.fault(f"has values of other lengths than keys ({head_dim}), which is not implemented")
    rotated = size("rope.dimension_count", head_dim)
    rope: dict[str, Any] = {"rope_theta": file.number(f"{architecture}.rope.freq_base", 10_000.0)}
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": context,
        "rope_parameters": rope | _scaling(file, architecture, context),
        "tie_word_embeddings": OUTPUT not in file.tensors,
        "bos_token_id": token_id(file, "bos"),
        "eos_token_id": eos_token_ids(file) or None,
    }


def _scaling(file: GGUFFile, architecture: str, context: int) -> dict[str, Any]:
    """How the file stretches its positions, as `rope_parameters` has it."""
    prefix = f"{architecture}.rope."
    kind = file.text(prefix + "scaling.type", "none")
    attention_factor = file.number(prefix + "scaling.attn_factor", 1.0)
    if ROPE_LONG in file.tensors or ROPE_SHORT in file.tensors:
        if kind not in ("none", "longrope"):
            raise file.fault(f"has {ROPE_LONG} beside rope scaling of type {kind!r}, which is not implemented")
        original = file.integer(prefix + "scaling.original_context_length")
        return {
            "rope_type": "longrope",
            "short_factor": _factors(file, ROPE_SHORT),
            "long_factor": _factors(file, ROPE_LONG),
            "original_max_position_embeddings": original,
            "attention_factor": attention_factor,
        }
    if attention_factor != 1.0:
        raise file.fault(f"has {attention_factor} as {prefix + 'scaling.attn_factor'!r}; only 1.0 is implemented")
    if ROPE_FREQUENCIES in file.tensors:
        if kind != "none":
            raise file.fault(f"has {ROPE_FREQUENCIES} beside rope scaling of type {kind!r}, which is not implemented")
        # the divisors of llama3 scaling, worked out by the converter: of which numbers, the file does not say
        factors = _factors(file, ROPE_FREQUENCIES)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }
    if kind == "none":
        linear = file.number(prefix + "scale_linear", 1.0)
        return {} if linear == 1.0 else {"rope_type": "linear", "factor": linear}
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.number(prefix + "scaling.factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": file.number(prefix + "scaling.factor"),
            "original_max_position_embeddings": file.integer(prefix + "scaling.original_context_length", context),
            "beta_fast": file.number(prefix + "scaling.yarn_beta_fast", 32.0),
            "beta_slow": file.number(prefix + "scaling.yarn_beta_slow", 1.0),
        }
    raise file.fault(f"has rope scaling of type {kind!r}; these are implemented: none, linear, yarn, longrope")


def _factors(file: GGUFFile, name: str) -> list[float]:
    if name not in file.tensors:
        raise file.fault(f"has no tensor {name!r} beside the other factors of longrope")
    if len(file.tensors[name].shape) != 1 or file.tensors[name].shape[0] > 1 << 12:
        raise file.fault(f"has tensor {name!r} of shape {file.tensors[name].shape}; factors are one list")
    factors = file.read(name)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise file.fault(f"has a factor in {name!r} that is no number above zero")
    return [float(each) for each in factors]


def _llama(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp converts as one."""
    if "partial_rotary_factor" in fields["rope_parameters"]:
        raise file.fault("turns a part of each head by its position, which is not implemented for 'llama'")
    _no_window(file, "llama", fields)
    return fields | {"model_type": "llama", "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _qwen2(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    _no_window(file, "qwen2", fields)
    return fields | {"model_type": "qwen2"}


def _qwen3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    _no_window(file, "qwen3", fields)
    return fields | {"model_type": "qwen3", "attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _gemma3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Text model of Gemma 3. The scale of its queries is not in the file; llama.cpp goes by the size as well."""
    rope = {"rope_theta": 1_000_000.0} if "gemma3.rope.freq_base" not in file.metadata else {}
    sliding = {"rope_theta": file.number("gemma3.rope.freq_base_swa", 10_000.0)}
    depth, window = fields["num_hidden_layers"], file.integer("gemma3.attention.sliding_window", 0)
    pattern = file.integer("gemma3.attention.sliding_window_pattern", 6)
    if window < 0 or pattern < 1:
        raise file.fault(f"has a sliding window of {window} tokens in a pattern of {pattern} layers")
    kinds = [SLIDING if window and (i + 1) % pattern else FULL for i in range(depth)]
    wide = depth == _GEMMA_27B_LAYERS
    return fields | {
        "model_type": "gemma3_text",
        "rope_parameters": {FULL: fields["rope_parameters"] | rope, SLIDING: sliding},
        "sliding_window": window or 1,
        "layer_types": kinds,
        "query_pre_attn_scalar": fields["hidden_size"] / fields["num_attention_heads"] if wide else fields["head_dim"],
    }


def _phi3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    window = file.integer("phi3.attention.sliding_window", 0)
    if window < 0:
        raise file.fault(f"has a sliding window of {window} tokens")
    fields = fields | {"model_type": "phi3", "sliding_window": window or None}
    rope = dict(fields["rope_parameters"])
    # transformers reads this one beside the parameters
    if (original := rope.pop("original_max_position_embeddings", None)) is not None:
        fields["original_max_position_embeddings"] = original
    return fields | {"rope_parameters": rope}


def _no_window(file: GGUFFile, architecture: str, fields: dict[str, Any]) -> None:
    window = file.integer(f"{architecture}.attention.sliding_window", 0)
    if 0 < window < fields["max_position_embeddings"]:
        raise file.fault(f"has a sliding window of {window} tokens, which is not implemented for {architecture!r}")


ARCHITECTURES: Mapping[str, Callable[[GGUFFile, dict[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
