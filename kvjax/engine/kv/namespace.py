"""Namespace of an engine's KV: all that must be equal for stored KV to be used."""

from pathlib import Path

import jax

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.identity import KVIdentity
from kvjax.store.digest import files_digest, known_digests, weights_digest
from kvjax.store.keys import Namespace


def namespace(path: Path, caches: CacheConfig, devices: int, row_invariance: str = "") -> Namespace:
    """The namespace of a checkpoint on the devices that are here: a new compiler, another device or other kernels
    compute other last digits.

    Args:
        path: folder of the checkpoint, every tensor of which is read, unless its digest is known already.
        devices: how many share the model.
        row_invariance: which sizes of a prefill chunk were seen to agree.
    """
    model, layout = caches.model, caches.layout
    identity = KVIdentity.of_device(
        jax.devices()[0],
        weights=weights_digest(path),
        tokenizer=files_digest([*path.glob("tokenizer*"), *path.glob("*.model")], known_digests()),
        rope=repr([layer.rope for layer in model.layers]),
        shape=f"{model.num_layers} x {model.num_kv_heads} x {model.head_dim}",
        kv_dtype=layout.kv_dtype,
        dtype=layout.dtype,
        devices=str(devices),
        attention_backend="" if layout.attention_backend == "reference" else layout.attention_backend,
        prefill_shapes=f"chunks of {', '.join(map(str, layout.sizes))} tokens",
        row_invariance=row_invariance,
    )
    return Namespace(
        weights=identity.weights,
        tokenizer=identity.tokenizer,
        rope=identity.rope,
        numerics=identity.numerics,
        dtype=identity.kv_dtype,
        shape=identity.shape,
    )
