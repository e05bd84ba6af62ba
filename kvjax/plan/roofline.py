"""Rooflines: the least time of a step, from the bytes it must move and the products it must form at full rates.

Nothing here is a measurement. A real step takes longer, and how much longer is not known before it has run.
"""

import dataclasses

import jax.numpy as jnp

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.memory import weights
from kvjax.plan.devices import Device


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """One token for every slot, each after a conversation as long as the context.

    Attributes:
        weights: bytes of weights that each device reads; `kv` bytes of keys, values and summaries of all slots.
        operations: of the products with weights, on each device. Attention adds one product for each element of KV and
            query head, which is less than any device here could do in the time of reading it.
        seconds: at full bandwidth, or at full arithmetic where that takes longer.
    """

    weights: int
    kv: int
    operations: float
    seconds: float

    @property
    def nbytes(self) -> int:
        return self.weights + self.kv


def decode_step(caches: CacheConfig, device: Device) -> DecodeStep:
    """The step of an engine of these caches with every slot at its full context."""
    model, layout = caches.model, caches.layout
    parts = dict(weights(model, layout.dtype, device.mesh))
    if not model.tied:
        del parts["embedding"]  # a step looks up one row a slot
    read = sum(parts.values())
    kv = layout.max_num_seqs * caches.read_bytes(layout.max_model_len) // device.parts
    operations = 2.0 * layout.max_num_seqs * read / jnp.dtype(layout.dtype).itemsize
    return DecodeStep(read, kv, operations, max((read + kv) / device.bandwidth, operations / device.flops))


def prefill_seconds(caches: CacheConfig, device: Device, chunks: int) -> list[float]:
    """Of each of a prompt's first chunks the least time to compute it, with the chunks before it in the cache."""
    model, layout = caches.model, caches.layout
    size, item = layout.prefill_chunk_size, jnp.dtype(layout.dtype).itemsize
    parts = weights(model, layout.dtype, device.mesh)
    layers = sum(nbytes for path, nbytes in parts.items() if path.startswith("layers."))
    heads = model.num_heads // device.parts
    seconds = []
    for chunk in range(chunks):
        pairs = sum(_pairs(chunk * size, size, layer.window) for layer in model.layers)
        # a query and a key: one product for the score and one for the value, two operations each
        operations = 2.0 * size * layers / item + 4.0 * heads * model.head_dim * pairs
        seconds.append(max(operations / device.flops, layers / device.bandwidth))
    return seconds


def _pairs(start: int, size: int, window: int | None) -> int:
    """Pairs of a query of a chunk and a key that it sees."""
    if window is None:
        return size * start + size * (size + 1) // 2
    growing = min(max(window - start, 0), size)  # queries that see everything before them
    return growing * start + growing * (growing + 1) // 2 + (size - growing) * window
