"""GGUF tensors by the names of a Hugging Face checkpoint, and as such a checkpoint has them.

llama.cpp's converter renames every tensor, and changes the numbers of two architectures:

    llama    rows of queries and keys are permuted, so that the two dimensions of a rotated pair lie side by side
    gemma3   1 is added to the weights of every norm

Source: conversion/llama.py and conversion/gemma.py of https://github.com/ggml-org/llama.cpp
"""

import re
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32

from kvjax.models.config import DecoderConfig
from kvjax.models.gguf.config import ARCHITECTURE, FACTORS
from kvjax.models.gguf.reader import GGUFFile

# `*` is the layer
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "blk.*.attn_q.weight": "model.layers.*.self_attn.q_proj.weight",
    "blk.*.attn_k.weight": "model.layers.*.self_attn.k_proj.weight",
    "blk.*.attn_v.weight": "model.layers.*.self_attn.v_proj.weight",
    "blk.*.attn_output.weight": "model.layers.*.self_attn.o_proj.weight",
    "blk.*.attn_q.bias": "model.layers.*.self_attn.q_proj.bias",
    "blk.*.attn_k.bias": "model.layers.*.self_attn.k_proj.bias",
    "blk.*.attn_v.bias": "model.layers.*.self_attn.v_proj.bias",
    "blk.*.attn_output.bias": "model.layers.*.self_attn.o_proj.bias",
    "blk.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "blk.*.ffn_gate.weight": "model.layers.*.mlp.gate_proj.weight",
    "blk.*.ffn_up.weight": "model.layers.*.mlp.up_proj.weight",
    "blk.*.ffn_down.weight": "model.layers.*.mlp.down_proj.weight",
}
_QK_NORMS = {
    "blk.*.attn_q_norm.weight": "model.layers.*.self_attn.q_norm.weight",
    "blk.*.attn_k_norm.weight": "model.layers.*.self_attn.k_norm.weight",
}
NAMES: dict[str, dict[str, str]] = {
    "llama": _NAMES,
    "qwen2": _NAMES,
    "qwen3": _NAMES | _QK_NORMS,
    "gemma3": _NAMES
    | _QK_NORMS
    | {
        "blk.*.post_attention_norm.weight": "model.layers.*.post_attention_layernorm.weight",
        "blk.*.ffn_norm.weight": "model.layers.*.pre_feedforward_layernorm.weight",
        "blk.*.post_ffw_norm.weight": "model.layers.*.post_feedforward_layernorm.weight",
    },
    "phi3": {
        name: hf
        for name, hf in _NAMES.items()
        if not name.startswith(("blk.*.attn_q.", "blk.*.attn_k.", "blk.*.attn_v.", "blk.*.ffn_gate."))
    }
    | {
        "blk.*.attn_qkv.weight": "model.layers.*.self_attn.qkv_proj.weight",
        "blk.*.ffn_up.weight": "model.layers.*.mlp.gate_up_proj.weight",
    },
}
# architectures that use tensors of factors, and which
_FACTORS = {"llama": FACTORS[:1], "phi3": FACTORS[1:]}
_LAYER = re.compile(r"^blk\.(0|[1-9]\d{0,8})\.")


class GGUFTensors:
    """The tensors of a GGUF file by the names of its family's table, dequantised on demand.

    Attributes:
        source: what an error calls the place where sizes come from.
    """

    source = "its metadata"

    def __init__(self, file: GGUFFile, config: DecoderConfig) -> None:
        """Raises ValueError for a format of weights that is not implemented."""
        file.check_quantisations()
        self._file, self._config = file, config
        self._architecture = file.text(ARCHITECTURE)
        names, factors = NAMES[self._architecture], _FACTORS.get(self._architecture, ())
        self._stored: dict[str, str] = {}
        for stored in file.tensors:
            if stored in factors:
                continue
            layer = _LAYER.match(stored)
            pattern = stored if layer is None else f"blk.*.{stored[layer.end() :]}"
            name = names.get(pattern, stored)
            self._stored[name if layer is None else name.replace("*", layer[1])] = stored

    @property
    def names(self) -> Iterable[str]:
        return self._stored

    def spelling(self, name: str) -> str:
        """A tensor's name in the file, or where there is none, the one it would have."""
        if name in self._stored:
            return self._stored[name]
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        pattern = name if layer is None else f"model.layers.*.{name[layer.end() :]}"
        for stored, hf in NAMES[self._architecture].items():
            if hf == pattern:
                return stored if layer is None else stored.replace("*", layer[1])
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; () if the file has none of that name."""
        return self._file.tensors[self._stored[name]].shape if name in self._stored else ()

    def dtype(self, name: str) -> str:
        """The type that `read` gives, as safetensors calls it."""
        return "F32"

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor as a Hugging Face checkpoint has it, in float32."""
        values = self._file.read(self._stored[name])
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            return values - np.float32(1)
        if self._architecture == "llama":
            if ".self_attn.q_proj." in name:
                return unpermute(values, self._config.num_heads)
            if ".self_attn.k_proj." in name:
                return unpermute(values, self._config.num_kv_heads)
        return values


def unpermute(values: Float32[np.ndarray, "R *C"], heads: int) -> Float32[np.ndarray, "R *C"]:
    """Rows of queries or keys with the pairs of a head as (i, i + D/2), from llama.cpp's (2i, 2i + 1)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
