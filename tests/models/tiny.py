"""Tiny decoders of every family, made here and not by transformers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kvjax.models import Decoder, DecoderConfig, LayerConfig, RopeConfig, abstract
from kvjax.models.parameters import materialise
from kvjax.models.rope import Linear, Llama3, LongRope, Yarn

ROPE = RopeConfig(8, 1e4)
LLAMA = DecoderConfig(
    family="llama",
    vocab_size=48,
    width=24,
    mlp_width=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerConfig(RopeConfig(8, 1e4, Llama3(8.0, 1.0, 4.0, 32))),) * 3,
    query_scale=8**-0.5,
    norm_eps=1e-5,
    max_position=256,
    bos_token_id=1,
    eos_token_ids=(2,),
)
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma3_text",
    layers=(LayerConfig(ROPE, 8), LayerConfig(RopeConfig(8, 1e6, Linear(8.0))), LayerConfig(ROPE, 8)),
    activation="gelu_tanh",
    query_scale=12**-0.5,
    qk_norm=True,
    post_norms=True,
    norm_plus_one=True,
    embed_scale=24**0.5,
    tied=True,
    eos_token_ids=(2, 5),
)
CONFIGS = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, family="mistral", layers=(LayerConfig(ROPE, 16),) * 2, tied=True),
    "qwen2": dataclasses.replace(
        LLAMA, family="qwen2", qkv_bias=True, layers=(LayerConfig(ROPE), LayerConfig(ROPE, 16))
    ),
    "qwen3": dataclasses.replace(
        LLAMA, family="qwen3", qk_norm=True, layers=(LayerConfig(RopeConfig(8, 1e4, Yarn(4.0, 64))),) * 2
    ),
    "gemma3": GEMMA,
    "phi3": dataclasses.replace(
        LLAMA,
        family="phi3",
        head_dim=4,
        query_scale=4**-0.5,
        layers=(LayerConfig(RopeConfig(2, 1e4, LongRope((1.0,), (2.0,), 64, 4.0))),) * 2,
    ),
}


def fill(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Decoder:
    """A decoder of NumPy's random numbers, norms and biases included: nothing is compiled for it."""
    random = np.random.default_rng(0)

    def value(path: str, param: nnx.Param[Any]) -> jax.Array:
        norm = path.endswith("norm.weight") and not config.norm_plus_one
        return jnp.asarray((norm + random.normal(0, 0.2, param.shape)).astype(dtype))

    return materialise(abstract(config, dtype), value)


@functools.cache
def decoder(name: str) -> Decoder:
    """The tiny decoder of that name, filled; shared, so nobody may change it."""
    return fill(CONFIGS[name])


def logits(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """`decoder(tokens)`, compiled as one program."""
    graphdef, state = nnx.split(decoder)
    return _logits(graphdef, state, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens)
