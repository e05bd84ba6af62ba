"""GGUF files for tests: a checkpoint of Hugging Face converted as llama.cpp does it.

Names come from the table of the `gguf` package, not from the one under test; weights are changed as in the converters
of https://github.com/ggml-org/llama.cpp (conversion/llama.py, gemma.py, phi.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
# of the K-quants there is no quantizer in Python: blocks of random bytes, with a scale that keeps numbers small
# (bytes of a block, where its scales are, and how large: those that keep the mean of the weights at zero)
K_QUANTS = {
    "Q4_K": (144, {0: 4e-4, 2: 7.5 * 4e-4}),
    "Q5_K": (176, {0: 2e-4, 2: 15.5 * 2e-4}),
    "Q6_K": (210, {208: 4e-5}),
}


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary."""
    from kvjax.engine.text.tokenizer import _BYTE_OF

    return sorted(_BYTE_OF, key=lambda character: _BYTE_OF[character])


def byte_level_vocabulary(size: int, merges: Sequence[str] = ("a b",)) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer of `size` tokens: three special ones, the bytes, joins, fillers."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_characters(), *(m.replace(" ", "") for m in merges)]
    tokens = (tokens + [f"<filler_{i}>" for i in range(size)])[:size]
    types = [CONTROL] * 3 + [NORMAL] * (size - 3)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def convert(
    folder: Path,
    path: Path,
    quantisation: str = "F32",
    *,
    metadata: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None] = lambda tensors: None,
) -> Path:
    """Write the checkpoint in `folder` as a GGUF file; `metadata` adds fields or replaces them, None drops one."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    fields = _fields(architecture, config) | dict(metadata or {})
    tensors = _tensors(architecture, config, load_file(folder / "model.safetensors"))
    tensors = edit(tensors) or tensors
    return write(path, architecture, fields, tensors, quantisation)


def write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantisation: str = "F32",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        if value is not None:
            _add(writer, name, value)
    random = np.random.default_rng(3)
    for name, values in tensors.items():
        matrix = values.ndim > 1
        if not matrix or quantisation == "F32":
            writer.add_tensor(name, values.astype(np.float32))
        elif quantisation in K_QUANTS:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(name, blocks(quantisation, values.shape, random), raw_dtype=kind)
        else:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(quantisation: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Random blocks of a K-quant: every bit pattern of the weights."""
    size, scales = K_QUANTS[quantisation]
    count = shape[-1] // 256
    raw = random.integers(0, 256, (*shape[:-1], count, size), np.uint8)
    for at, size_of_scale in scales.items():
        scale = (size_of_scale * random.uniform(0.8, 1.2, (*shape[:-1], count, 1))).astype(np.float16)
        raw[..., at : at + 2] = scale.view(np.uint8)
    return raw.reshape(*shape[:-1], count * size)


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _fields(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    fields = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * partial),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        fields["rope.scaling.type"] = rope["rope_type"]
        fields["rope.scaling.factor"] = float(rope["factor"])
    if "original_max_position_embeddings" in rope and architecture != "llama":
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "longrope":
        original = config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
        fields["rope.scaling.original_context_length"] = original
        scale = config["max_position_embeddings"] / original
        fields["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(original))) if scale > 1 else 1.0
    if architecture in ("gemma3", "phi3"):
        fields["attention.sliding_window"] = config.get("sliding_window") or 0
    named = {f"{architecture}.{name}": value for name, value in fields.items()}
    return named | byte_level_vocabulary(config["vocab_size"])


def _tensors(architecture: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    converted = {}
    for name, values in tensors.items():
        stem, _, suffix = name.rpartition(".")
        stored = names.get_name(stem)
        assert stored is not None, name
        if architecture == "llama" and ".q_proj." in name:
            values = _permute(values, heads)
        if architecture == "llama" and ".k_proj." in name:
            values = _permute(values, kv_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        converted[f"{stored}.{suffix}"] = values
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "llama3":
        converted["rope_freqs.weight"] = _llama3_factors(config, rope)
    if rope.get("rope_type") == "longrope":
        converted["rope_factors_long.weight"] = np.array(rope["long_factor"], np.float32)
        converted["rope_factors_short.weight"] = np.array(rope["short_factor"], np.float32)
    return converted


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> np.ndarray:
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / frequency
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
