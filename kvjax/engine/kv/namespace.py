"""Namespace of an engine's KV: all that must be equal for stored KV to be used."""

from pathlib import Path

import jax

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.identity import KVIdentity
from kvjax.models import DecoderConfig
from kvjax.store.block import BlockLayout
from kvjax.store.digest import files_digest, known_digests, weights_digest
from kvjax.store.keys import Namespace
from kvjax.store.opening import open_store
from kvjax.store.store import KVStore


def namespace(path: Path, caches: CacheConfig, devices: int) -> Namespace:
    """The namespace of a checkpoint on the devices that are here: a new compiler, another device or other kernels
    compute other last digits.

    Args:
        path: folder of the checkpoint, or its file, every tensor of which is read, unless its digest is known already.
        devices: how many share the model.
    """
    model, layout = caches.model, caches.layout
    tokenizer = [*path.glob("tokenizer*"), *path.glob("*.model")] if path.is_dir() else [path]
    identity = KVIdentity.of_device(
        jax.devices()[0],
        weights=weights_digest(path),
        tokenizer=files_digest(tokenizer, known_digests()),
        rope=repr([layer.rope for layer in model.layers]),
        shape=f"{model.num_layers} x {model.num_kv_heads} x {model.head_dim}",
        kv_dtype=layout.kv_dtype,
        dtype=layout.dtype,
        devices=str(devices),
        attention_backend="" if layout.attention_backend == "reference" else layout.attention_backend,
        # not the smaller sizes: those that are mixed give the same bits as the largest alone
        prefill_shapes=f"chunks of {layout.prefill_chunk_size} tokens",
    )
    return Namespace(
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        rope=identity.rope,
        numerics=identity.numerics,
        dtype=identity.kv_dtype,
        shape=identity.shape,
    )


def open_kv_store(caches: CacheConfig) -> KVStore | None:
    """The store that an engine's configuration names; None if it names none.

    Raises:
        TierError, ValueError, ImportError: the store cannot be opened; says why.
    """
    model, config = caches.model, caches.layout.store
    if config is None or not config.host_cache_size:
        return None
    return open_store(block_layout(model, caches.layout.kv_dtype), config)


def block_layout(model: DecoderConfig, kv_dtype: str) -> BlockLayout:
    """The layout of a model's blocks."""
    return BlockLayout(model.num_layers, model.num_kv_heads, model.head_dim, kv_dtype)
