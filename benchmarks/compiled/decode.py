"""Decode step of Llama 3.1 8B over contexts of 131,072 tokens, as a program for `benchmarks.compiled.aot`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax import cache, models
from kvjax.cache import ArraySpec
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig
from kvjax.models.rope import Llama3

LLAMA = DecoderConfig(
    family="llama",
    vocab_size=128_256,
    width=4096,
    mlp_width=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    layers=(
        LayerConfig(
            RopeConfig(
                dim=128,
                theta=500_000.0,
                scaling=Llama3(
                    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
                ),
            )
        ),
    )
    * 32,
    query_scale=128**-0.5,
    norm_eps=1e-5,
    max_position=131_072,
)


def caches(slots: int, **budget: Any) -> CacheConfig:
    """The cache config of an engine with so many slots, on a device other than a CPU."""
    config = EngineConfig(max_num_seqs=slots, **budget)
    return CacheConfig.declare(LLAMA, ResolvedConfig.resolve(config, LLAMA.max_position, "tpu"))


def decode_step(kept: CacheConfig) -> tuple[Callable[[str], tuple[Callable[..., Any], tuple[Any, ...]]], int]:
    """From the name of an implementation the step and its arguments' shapes, and the bytes of its views.

    Views and state, arguments 2 and 3, are to be donated.
    """

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        model = models.abstract(LLAMA, jnp.bfloat16)
        kinds, leaves = [], []
        for layer, config in zip(model.layers, LLAMA.layers, strict=True):
            part, arrays = steps.Part.split(layer)
            kinds.append(steps.LayerKind(part, config.window, LLAMA.query_scale, None, name))
            leaves.append(arrays)
        model.layers = nnx.List([])
        trunk, trunk_leaves = steps.Part.split(model)

        def step(trunk_leaves: Any, leaves: Any, views: Any, state: Any, alive: Any, count: Any) -> Any:
            return steps.decode(
                trunk,
                tuple(kinds),
                kept.plans,
                kept.layout.decode_steps,
                trunk_leaves,
                leaves,
                views,
                state,
                alive,
                count,
            )

        slots = kept.layout.max_num_seqs
        arguments = (
            trunk_leaves,
            tuple(leaves),
            kept.views,
            steps.DecodeState.declare(slots, LLAMA.vocab_size),
            jax.ShapeDtypeStruct((slots,), jnp.bool_),
            jax.ShapeDtypeStruct((), jnp.int32),
        )

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

        return step, jax.tree.map(shape, arguments, is_leaf=lambda leaf: isinstance(leaf, ArraySpec))

    return make, cache.nbytes(kept.views)
