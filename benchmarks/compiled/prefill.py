"""Prefill of Llama 3.1 8B over workspaces of 131,072 tokens, as programs for `benchmarks.compiled.aot`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiled.decode import LLAMA
from kvjax import cache, models
from kvjax.cache import ArraySpec
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.pallas.prefill_attention import prefill_attention

Make = Callable[[str], tuple[Callable[..., Any], tuple[Any, ...]]]

CHUNK = 2048
# of a chunk, in bytes: both products that the MLP multiplies, its input before and after the norm, and its output
PRODUCT = CHUNK * LLAMA.mlp_width * 2
ACTIVATIONS = 2 * PRODUCT + 3 * CHUNK * LLAMA.width * 2
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def attention(window: int | None) -> tuple[Make, int]:
    """One chunk over a workspace, and the workspace's bytes.

    Queries come as a projection leaves them and the output goes as the next one wants it, or XLA would have to lay them
    out anew on a TPU, which a whole layer does not do.
    """
    heads, kv_heads, head_dim = LLAMA.num_heads, LLAMA.num_kv_heads, LLAMA.head_dim
    flat = jax.ShapeDtypeStruct((CHUNK, heads * head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((kv_heads, LLAMA.max_position, head_dim), jnp.bfloat16)

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def operation(q: Any, k: Any, v: Any, start: Any) -> jax.Array:
            q = q.reshape(CHUNK, heads, head_dim)
            out = prefill_attention(q, k, v, start, scale=LLAMA.query_scale, window=window, implementation=name)
            return out.reshape(flat.shape)

        return operation, (flat, kv, kv, NUMBER)

    return make, 2 * kv.size * kv.dtype.itemsize


def layer(kept: CacheConfig) -> tuple[Make, int]:
    """One chunk through one layer, and its workspace's bytes. Hidden states and workspace, 1 and 2, are donated."""
    workspace = kept.workspace(LLAMA.max_position)

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kind, leaves = _kind(name)
        hidden = jax.ShapeDtypeStruct((LLAMA.max_position, LLAMA.width), jnp.bfloat16)

        def step(leaves: Any, hidden: Any, workspace: Any, start: Any, length: Any) -> Any:
            return steps.prefill_layer(kind, CHUNK, leaves, hidden, workspace, start, length)

        return step, _shapes((leaves, hidden, workspace, NUMBER, NUMBER))

    return make, cache.nbytes(workspace)


def write_slot(kept: CacheConfig) -> tuple[Make, int]:
    """The write of a finished workspace into a view, and the workspace's bytes. The view, 0, is donated."""
    workspace = kept.workspace(LLAMA.max_position)

    def make(name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        kind, _ = _kind(name)
        limits = cache.rows(cache.SlotLimits.declare(kept.layout.max_num_seqs))

        def step(view: Any, workspace: Any, slot: Any, length: Any, limits: Any) -> Any:
            return steps.write_slot(kind, kept.plans[0], view, workspace, slot, length, limits)

        return step, _shapes((kept.views[0], workspace, NUMBER, NUMBER, limits))

    return make, cache.nbytes(workspace)


def retained_bytes(kept: CacheConfig) -> int:
    """Of the K and V of one view of one slot, which a tpu7x gathers before it writes them."""
    return cache.nbytes((kept.views[0].k, kept.views[0].v)) // kept.layout.max_num_seqs


def _kind(kernels: str) -> tuple[steps.LayerKind, tuple[Any, ...]]:
    """A layer with these kernels, and its weights."""
    part, leaves = steps.Part.split(models.abstract(LLAMA, jnp.bfloat16).layers[0])
    return steps.LayerKind(part, LLAMA.layers[0].window, LLAMA.query_scale, None, kernels), leaves


def _shapes(arguments: Any) -> Any:
    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(shape, arguments, is_leaf=lambda leaf: isinstance(leaf, ArraySpec))
