"""Load or recompute: the KV of a prompt's beginning from a tier of the store, or through the layers once more.

The choice is that of the store's own `Planner`, given rooflines instead of what it measures while serving.
"""

import dataclasses
import itertools

from kvjax.engine.device.cache_config import CacheConfig
from kvjax.plan.devices import Device
from kvjax.plan.roofline import prefill_seconds
from kvjax.store.block import BlockLayout
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.planner import Planner


@dataclasses.dataclass(frozen=True)
class TierRate:
    """A place that KV is loaded from: bytes a second, of all devices together."""

    name: str
    bandwidth: float

    def __post_init__(self) -> None:
        if self.bandwidth <= 0:
            raise ValueError(f"--{self.name}-bandwidth {self.bandwidth:g} must be more than 0: bytes a second, as 7GB")


@dataclasses.dataclass(frozen=True)
class Load:
    """A tier against computing.

    Attributes:
        bandwidth: of the tier, or of the link to the devices where that is slower.
        seconds: to load all whole chunks of the context.
        tokens: of those, how many the planner would load.
        break_even: tokens of the shortest prefix that is loaded faster than computed; None if none is.
    """

    tier: str
    bandwidth: float
    seconds: float
    tokens: int
    break_even: int | None


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The whole chunks of a context, which are loaded or computed.

    Attributes:
        nbytes: of its blocks in the store: every layer in full, headers included.
        compute: of each chunk, in order, the least seconds of computing it.
    """

    tokens: int
    nbytes: int
    compute: tuple[float, ...]
    loads: tuple[Load, ...]

    @property
    def compute_seconds(self) -> float:
        """At full arithmetic of all devices."""
        return sum(self.compute, 0.0)

    @property
    def even_bandwidth(self) -> float | None:
        """Bytes a second at which loading it takes as long as computing it; None without a whole chunk."""
        return self.nbytes / self.compute_seconds if self.tokens else None


def prefix(caches: CacheConfig, device: Device, tiers: tuple[TierRate, ...]) -> Prefix:
    """Compares each tier with computing. The first tier is host memory, which the others' bytes pass through."""
    model, layout = caches.model, caches.layout
    chunks = layout.max_model_len // layout.prefill_chunk_size
    form = BlockLayout(model.num_layers, model.num_kv_heads, model.head_dim, layout.kv_dtype)
    chunk_bytes = layout.prefill_chunk_size // BLOCK_TOKENS * form.nbytes
    compute = prefill_seconds(caches, device, chunks)
    loads = []
    for tier in tiers:
        bandwidth = min(tier.bandwidth, tiers[0].bandwidth)
        load = chunk_bytes / bandwidth
        gains = itertools.accumulate(seconds - load for seconds in compute)
        first = next((index for index, gain in enumerate(gains) if gain > 0), None)
        chosen = _chosen(compute, tier.name, load)
        loads.append(
            Load(
                tier.name,
                bandwidth,
                chunks * load,
                chosen * layout.prefill_chunk_size,
                None if first is None else (first + 1) * layout.prefill_chunk_size,
            )
        )
    return Prefix(chunks * layout.prefill_chunk_size, chunks * chunk_bytes, tuple(compute), tuple(loads))


def _chosen(compute: list[float], tier: str, load: float) -> int:
    planner = Planner()
    for index, seconds in enumerate(compute):
        planner.computed(index, seconds)
    planner.loaded(tier, load)
    return planner.choose([tier] * len(compute))
