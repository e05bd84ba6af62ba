"""Row invariance: whether a row of a prefill has the same bits in units of several sizes, tried on this device.

No compiler promises that, so each kind of layer is tried on random hidden states, with the steps that serve. A stored
prefix is then used up to any multiple of the smallest size.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from kvjax import cache
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.prefill import schedule
from kvjax.engine.device.split_model import SplitModel


def agreeing_sizes(model: SplitModel, caches: CacheConfig, sizes: Sequence[int], mesh: Mesh | None) -> tuple[int, ...]:
    """Those of `sizes`, in tokens and increasing order, in which a prefill gives every row the bits of the largest."""
    stored = [bucket for bucket in caches.layout.buckets if bucket >= sizes[-1]]
    if len(sizes) == 1 or not stored:
        return tuple(sizes)
    bucket = next((bucket for bucket in stored if bucket >= 2 * sizes[-1]), stored[0])
    hidden = np.random.default_rng(0).standard_normal((bucket, caches.model.width), np.float32)
    kinds = {kind: layer for layer, kind in enumerate(model.kinds)}
    agreeing = set(sizes)
    for layer in kinds.values():
        expected = _through_layer(model, caches, mesh, layer, hidden, schedule(0, bucket, sizes[-1:], bucket))
        for size in sizes[:-1]:
            # small units alone, and large ones that begin behind a small one
            for units in (schedule(0, bucket, (size,), bucket), schedule(0, size, (size,), bucket)):
                rest = schedule(units[-1][0] + size, bucket, sizes, bucket)
                if _through_layer(model, caches, mesh, layer, hidden, units + rest) != expected:
                    agreeing.discard(size)
    return tuple(size for size in sizes if size in agreeing)


def _through_layer(
    model: SplitModel,
    caches: CacheConfig,
    mesh: Mesh | None,
    layer: int,
    hidden: Float[np.ndarray, "T E"],
    units: Sequence[tuple[int, int]],
) -> bytes:
    """The bytes of all that units leave: hidden states, keys and values."""
    kind, bucket = model.kinds[layer], len(hidden)
    x = steps.embed(model.trunk, model.trunk_leaves, np.zeros(bucket, np.int32))
    x = jax.device_put(hidden.astype(x.dtype), x.sharding)
    [workspace] = cache.allocate([caches.workspace(bucket)], mesh)
    for start, size in units:
        x, workspace = steps.prefill_layer(
            kind, size, model.layer_leaves[layer], x, workspace, np.int32(start), np.int32(bucket)
        )
    return b"".join(np.asarray(array).tobytes() for array in (x, workspace.k, workspace.v))
