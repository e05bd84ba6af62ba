"""GGUF: a whole model in one file, as llama.cpp has it. Weights, configuration and tokenizer."""

from kvjax.models.gguf.config import ARCHITECTURES, hf_config
from kvjax.models.gguf.files import find_gguf, is_gguf, model_name
from kvjax.models.gguf.reader import QUANTISATIONS, SUFFIX, GGUFFile
from kvjax.models.gguf.tensors import GGUFTensors
from kvjax.models.gguf.tokenizer import read_tokenizer

__all__ = [
    "ARCHITECTURES",
    "QUANTISATIONS",
    "SUFFIX",
    "GGUFFile",
    "GGUFTensors",
    "find_gguf",
    "hf_config",
    "is_gguf",
    "model_name",
    "read_tokenizer",
]
