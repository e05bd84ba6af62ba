"""Namespace of an engine's KV: all that must be equal for stored KV to be used."""

from pathlib import Path

import jax

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.store.digest import files_digest, known_digests, weights_digest
from kvjax.store.keys import Namespace


def namespace(path: Path, caches: CacheConfig, devices: int) -> Namespace:
    """The namespace of a checkpoint on the devices that are here: a new compiler, another device or other kernels
    compute other last digits.

    Args:
        path: folder of the checkpoint, every tensor of which is read, unless its digest is known already.
        devices: how many share the model.
    """
    device, model, layout = jax.devices()[0], caches.model, caches.layout
    numerics = (
        f"jax {jax.__version__}, {devices} x {device.device_kind}, {layout.dtype}, chunk {layout.prefill_chunk_size}"
    )
    if layout.attention_backend != "reference":
        numerics += f", kernels {layout.attention_backend}"
    return Namespace(
        weights=weights_digest(path),
        tokenizer=files_digest([*path.glob("tokenizer*"), *path.glob("*.model")], known_digests()),
        rope=repr([layer.rope for layer in model.layers]),
        numerics=numerics,
        dtype=layout.kv_dtype,
        shape=f"{model.num_layers} x {model.num_kv_heads} x {model.head_dim}",
    )
