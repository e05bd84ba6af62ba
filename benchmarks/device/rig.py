"""Rig of `benchmarks.device`: the device with its published figures, the model and its weights, the sizes."""

import dataclasses
import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from benchmarks.compiled.decode import LLAMA
from kvjax import models
from kvjax.engine.config import EngineConfig, ResolvedConfig
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig
from kvjax.pallas.dispatch import REFERENCE
from kvjax.plan.devices import Device

# by the beginning of what JAX calls them; longer names before the shorter ones that they begin with
NAMES = {
    "NVIDIA A100": "a100",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
}
SHARE = 0.9  # of a device's memory, where it does not report its limit


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model split as the engine splits it: the trunk, and each layer."""

    trunk: steps.Part[Any]
    trunk_leaves: tuple[Array, ...]
    parts: tuple[steps.Part[Any], ...]
    leaves: tuple[tuple[Array, ...], ...]


@dataclasses.dataclass(frozen=True)
class Rig:
    """One device, and the sizes that are measured on it.

    Attributes:
        device: its published figures, by which times are predicted.
        quick: toy sizes, in which a CPU takes the place of the device.
        batches, contexts, budgets: slots, tokens of a conversation, and token budgets.
        rounds: repetitions, the median of which counts.
        page, read: of a view that kernels read: entries of a page, and entries that are attended to exactly.
    """

    device: Device
    quick: bool
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    budgets: tuple[int, ...]
    rounds: int

    @property
    def page(self) -> int:
        return 8 if self.quick else 16

    @property
    def read(self) -> int:
        return 32 if self.quick else 1024

    @functools.cached_property
    def model(self) -> DecoderConfig:
        """Llama 3.1 8B, or a toy of its kind."""
        if not self.quick:
            return LLAMA
        layer = LayerConfig(RopeConfig(dim=32, theta=10_000.0))
        return dataclasses.replace(
            LLAMA, vocab_size=256, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_dim=32,
            layers=(layer,) * 2, query_scale=32**-0.5, max_position=4096,
        )  # fmt: skip

    @property
    def platform(self) -> str:
        """For which the engine's layout is resolved. What a toy runs on does not matter to what is predicted."""
        return "cpu" if self.quick else self.device.chip.platform

    @property
    def dtype(self) -> Any:
        return jnp.float32 if self.quick else jnp.bfloat16

    @property
    def attention_backend(self) -> str | None:
        """The name of the kernels for the device; None where JAX runs on another, and only the reference can."""
        return None if self.quick else self.device.chip.platform

    @property
    def implementations(self) -> tuple[str, ...]:
        return (REFERENCE,) if self.attention_backend is None else (self.attention_backend, REFERENCE)

    @property
    def headline(self) -> tuple[int, int]:
        """The batch and the context that matter most: they are measured first."""
        return 8 if 8 in self.batches else max(self.batches), max(self.contexts)

    def order(self, batch: int, context: int) -> int:
        """0 for what matters most, 2 for what matters least."""
        first, longest = self.headline
        if batch == first:
            return 0 if context >= 0.7 * longest else 1
        return 1 if context == longest else 2

    def caches(self, batch: int, context: int, budget: int | None, decode_steps: int = 8) -> CacheConfig:
        """The cache config of an engine: full, or RocketKV with a token budget."""
        config = EngineConfig(
            max_model_len=context, max_num_seqs=batch, token_budget=budget, decode_steps=decode_steps,
            prefill_chunk_size=256 if self.quick else None, attention_backend="auto",
        )  # fmt: skip
        return CacheConfig.declare(self.model, ResolvedConfig.resolve(config, self.model.max_position, self.platform))

    @property
    def memory(self) -> int:
        """Bytes on the device that this process may take."""
        limit = None if self.quick else (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        return limit or int(SHARE * self.device.memory)

    @functools.cached_property
    def decoder(self) -> models.Decoder:
        """With random weights, made on the device."""
        return models.random(self.model, jax.random.key(0), self.dtype)

    @functools.cached_property
    def weights(self) -> Weights:
        trunk = nnx.merge(*nnx.split(self.decoder))  # the same arrays in another module
        split = [steps.Part.split(layer) for layer in trunk.layers]
        trunk.layers = nnx.List([])
        part, leaves = steps.Part.split(trunk)
        first = {one: one for one, _ in split}  # equal parts become one object: compared at every call
        return Weights(part, leaves, tuple(first[one] for one, _ in split), tuple(arrays for _, arrays in split))

    def kinds(self, implementation: str) -> tuple[steps.LayerKind, ...]:
        layers = zip(self.weights.parts, self.model.layers, strict=True)
        return tuple(
            steps.LayerKind(part, layer.window, self.model.query_scale, None, implementation) for part, layer in layers
        )


def device_name() -> str | None:
    """The planner's name of the device that JAX runs on; None if it knows no such device."""
    kind = jax.devices()[0].device_kind
    return next((name for begin, name in NAMES.items() if kind.startswith(begin)), None)


def there(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.partial(jax.jit, static_argnums=(0, 1))
def noise(shape: tuple[int, ...], dtype: Any, seed: int | Array) -> Float[Array, "*shape"]:
    """Numbers between -1.7 and 1.7 without an order, of variance 1.

    Each is computed from its place alone: no temporaries, where a cache leaves no room for those of `jax.random`.
    """
    x = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) * jnp.uint32(0x9E3779B9) + jnp.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return ((x >> 8).astype(jnp.float32) * (2 * 3**0.5 / (1 << 24)) - 3**0.5).astype(dtype)
