"""A random model in a folder, with two kinds of layers and a tokenizer of bytes; and what its answers must be.

The scores of its attention are large, so a key too many or too few, or one at the wrong position, shows in every
logit.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from kvjax import models
from kvjax.models import Decoder, DecoderConfig, LayerConfig, RopeConfig
from kvjax.models.parameters import Constant, Normal, materialise
from kvjax.models.rope import Linear

WINDOW = 100
CONTEXT = 1000  # no multiple of anything: the last block and the last chunk stick out
EOS = 0
SPECIAL = ("<|eos|>", "<|pad|>", "<|user|>", "<|end|>")
VOCAB = 300  # more rows than the tokenizer has tokens, as in most published models

LOCAL, GLOBAL = LayerConfig(RopeConfig(16, 1e4), WINDOW), LayerConfig(RopeConfig(16, 1e5, Linear(2.0)))
CONFIG = DecoderConfig(
    family="gemma3_text",
    vocab_size=VOCAB,
    width=48,
    mlp_width=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    layers=(LOCAL, GLOBAL, GLOBAL),
    query_scale=1.0,
    norm_eps=1e-6,
    max_position=CONTEXT,
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    norm_plus_one=True,
    embed_scale=48**0.5,
    bos_token_id=2,
    eos_token_ids=(EOS,),
)
# heads fill the lanes of a TPU, so that kernels serve it, and every layer sees everything
LLAMA = dataclasses.replace(
    CONFIG,
    family="llama",
    num_heads=4,
    head_dim=128,
    layers=(LayerConfig(RopeConfig(128, 1e4)),) * 2,
    query_scale=128**-0.5,
    max_position=256,
    activation="silu",
    qk_norm=False,
    post_norms=False,
    norm_plus_one=False,
    embed_scale=1.0,
)


def characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """A token a byte, some words, and tokens that hold the end of one character and the beginning of the next."""
    of = characters()
    # 你好 and 好你 share a token across the border of their characters, and so do two of the same emoji
    pairs = ["th", "he", " t", "in", "er", "an", " a", "\n\n", "  ", "你好"[1:2]]
    merges = []
    for pair in pairs:
        first, second, *_ = pair.encode()
        merges.append((of[first], of[second]))
    merges += [(of[0xA0], of[0xE5]), (of[0xBD], of[0xE4]), (of[0x80], of[0xF0]), (of[0x9F], of[0x98])]
    vocabulary = {name: index for index, name in enumerate([*SPECIAL, *of, *("".join(pair) for pair in merges)])}
    assert len(vocabulary) < VOCAB
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, merges))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """A SentencePiece-like vocabulary: ASCII characters, and bytes for all others."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<|pad|>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@functools.cache
def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    """Weights are NumPy's random numbers: nothing is compiled for them."""
    random = np.random.default_rng(7)

    def value(path: str, param: nnx.Param[Any]) -> jax.Array:
        match param.get_metadata()["initialiser"]:
            case Constant(mean):
                return jnp.asarray(mean + random.normal(0, 0.2, param.shape), param.dtype)
            case Normal(inputs):
                sharper = 3 if path.startswith("unembedding") else 1  # greedy answers are not decided by rounding
                return jnp.asarray(random.normal(0, sharper * inputs**-0.5, param.shape), param.dtype)
            case _:
                return jnp.asarray(random.normal(0, 0.07, param.shape), param.dtype)

    return materialise(models.abstract(config), value)


def write(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    """The model as a checkpoint with a tokenizer; returns the folder."""
    models.save(decoder(config), folder)
    byte_level().save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens, any of the model's but the end of a text."""
    return np.random.default_rng([seed, length]).integers(1, VOCAB, length).tolist()


def logits(tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, V] after each token, by the dense model over the whole sequence at once."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_dense(*_split(), padded)[0, : len(tokens)])


def logprobs(tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token."""
    return log_softmax(logits(tokens))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@functools.cache
def _split() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(decoder())


@functools.partial(jax.jit, static_argnums=0)
def _dense(graphdef: nnx.GraphDef, state: nnx.State, tokens: np.ndarray) -> jax.Array:
    return nnx.merge(graphdef, state)(jnp.asarray(tokens))
