"""Baselines: attention of one token a slot over a whole cache by `jax.nn` and cuDNN.

Each knows that several query heads share a kv head, and repeats nothing. Caches are laid out token by token, as these
expect them.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from benchmarks.device.rig import Rig, there


def jax_attention(
    q: Float[Array, "B H D"],
    k: Float[Array, "B C K D"],
    v: Float[Array, "B C K D"],
    entries: Int[Array, "B"] | None = None,
    *,
    scale: float,
    implementation: str,
) -> Float[Array, "B H D"]:
    """`jax.nn.dot_product_attention` over the first `entries` of each slot, or over all of them."""
    out = jax.nn.dot_product_attention(
        q[:, None], k, v, scale=scale, key_value_seq_lengths=entries, implementation=implementation
    )
    return out[:, 0]


OUTSIDE: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {name: functools.partial(jax_attention, implementation=name) for name in ("xla", "cudnn")}
)


def unserved(rig: Rig, name: str) -> str | None:
    """The reason why one of `OUTSIDE`, or torch, does not run on a rig's device; None if it does."""
    if name == "torch" and not there("torch"):
        return "torch is not installed"
    if name == "torch" and rig.device.chip.platform == "tpu":
        return "torch does not reach a TPU"
    if name == "cudnn" and rig.attention_backend != "gpu":
        return "cuDNN is for GPUs of NVIDIA"
    return None
