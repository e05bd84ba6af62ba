"""Decoder-only language models in Flax NNX, and the loader of Hugging Face checkpoints.

Flax is for definitions: split a decoder once and jit plain functions of its leaves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kvjax.models.causal_attention import causal_attention
from kvjax.models.checkpoint import load, read_config, sampling_defaults, save
from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.decoder import Decoder, Layer
from kvjax.models.layers import Attend
from kvjax.models.parameters import initial, materialise
from kvjax.models.rope import RopeConfig
from kvjax.models.sharding import shardings

__all__ = [
    "Attend",
    "Decoder",
    "DecoderConfig",
    "Layer",
    "LayerConfig",
    "RopeConfig",
    "abstract",
    "causal_attention",
    "load",
    "random",
    "read_config",
    "sampling_defaults",
    "save",
    "shardings",
]


def abstract(config: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Decoder:
    """A decoder whose arrays are `jax.ShapeDtypeStruct`: sizes, shardings and compilation without weights."""
    return Decoder(config, dtype)


def random(
    config: DecoderConfig,
    key: Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    embedding_std: float = 0.02,
) -> Decoder:
    """A decoder with initial weights: normal with variance 1/inputs, norms at identity, biases zero.

    `embedding_std` is the standard deviation of the embedding table; training recipes differ in it.
    """
    count = iter(range(1 << 31))
    return materialise(
        Decoder(config, dtype),
        lambda _, param: initial(param, jax.random.fold_in(key, next(count)), embedding_std),
    )
