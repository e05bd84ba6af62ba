"""The parts of a decoder layer. They know no cache, no mask and no batch: `attend` is handed to them.

Weights keep Hugging Face's orientation, outputs first: nothing is transposed when loading, and products over
the last axes are faster than inputs first on XLA's CPU backend for two rows and more.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.models.config import DecoderConfig, LayerConfig
from kvjax.models.linear import linear
from kvjax.models.parameters import Constant, Normal, declare
from kvjax.models.rope import rotate, rotation

# Queries and keys come rotated; scale and mask are attend's business.
Attend = Callable[[Float[Array, "*B H D"], Float[Array, "*B K D"], Float[Array, "*B K D"]], Float[Array, "*B H D"]]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, size: int, config: DecoderConfig, dtype: jax.typing.DTypeLike, axis: str = "width") -> None:
        self.eps = config.norm_eps
        self.plus_one = config.norm_plus_one
        self.weight = declare(Constant(0.0 if self.plus_one else 1.0), dtype, **{axis: size})

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (wide * (1.0 + weight if self.plus_one else weight)).astype(x.dtype)


class Attention(nnx.Module):
    """Projections around `attend`: queries, keys and values, normed and rotated, then the output."""

    def __init__(self, config: DecoderConfig, layer: LayerConfig, dtype: jax.typing.DTypeLike) -> None:
        width, heads, kv_heads, dim = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        self.rope = layer.rope
        self.qkv_biased, self.output_biased, self.qk_norm = (
            config.qkv_bias,
            config.output_bias,
            config.qk_norm,
        )
        self.query = declare(Normal(width), dtype, heads=heads, head_dim=dim, width=width)
        self.key = declare(Normal(width), dtype, kv_heads=kv_heads, head_dim=dim, width=width)
        self.value = declare(Normal(width), dtype, kv_heads=kv_heads, head_dim=dim, width=width)
        # heads and their dims are one axis: a TPU tiles the last two, and would copy three to flatten them
        self.output = declare(Normal(heads * dim), dtype, width=width, heads=heads * dim)
        if config.qkv_bias:
            self.query_bias = declare(Constant(0.0), dtype, heads=heads, head_dim=dim)
            self.key_bias = declare(Constant(0.0), dtype, kv_heads=kv_heads, head_dim=dim)
            self.value_bias = declare(Constant(0.0), dtype, kv_heads=kv_heads, head_dim=dim)
        if config.output_bias:
            self.output_bias = declare(Constant(0.0), dtype, width=width)
        if config.qk_norm:
            self.query_norm = RMSNorm(config.head_dim, config, dtype, axis="head_dim")
            self.key_norm = RMSNorm(config.head_dim, config, dtype, axis="head_dim")

    def __call__(self, x: Float[Array, "*B E"], positions: Int[Array, "*B"], attend: Attend) -> Float[Array, "*B E"]:
        q, k, v = (linear(x, weight[...]) for weight in (self.query, self.key, self.value))
        if self.qkv_biased:
            q, k, v = q + self.query_bias[...], k + self.key_bias[...], v + self.value_bias[...]
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        cos, sin = rotation(self.rope, positions)
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        out = linear(attended.reshape(*attended.shape[:-2], -1), self.output[...])
        return out + self.output_bias[...] if self.output_biased else out


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, dtype: jax.typing.DTypeLike) -> None:
        width, mlp = config.width, config.mlp_width
        self.activation = config.activation
        self.gate = declare(Normal(width), dtype, mlp=mlp, width=width)
        self.up = declare(Normal(width), dtype, mlp=mlp, width=width)
        self.down = declare(Normal(mlp), dtype, width=width, mlp=mlp)
        self.biased = config.mlp_bias
        if config.mlp_bias:
            self.gate_bias = declare(Constant(0.0), dtype, mlp=mlp)
            self.up_bias = declare(Constant(0.0), dtype, mlp=mlp)
            self.down_bias = declare(Constant(0.0), dtype, width=width)

    def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
        gate, up = linear(x, self.gate[...]), linear(x, self.up[...])
        if self.biased:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        out = linear(_ACTIVATIONS[self.activation](gate) * up, self.down[...])
        return out + self.down_bias[...] if self.biased else out
