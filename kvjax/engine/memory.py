"""Bytes on the devices by purpose, from shapes alone: known, and refused, before a weight is read."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from kvjax import cache, models
from kvjax.attention.dense import DECODE_BLOCK, PREFILL_BLOCK
from kvjax.engine.caches import CacheConfig
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.steps import SCORED_ROWS, DecodeState
from kvjax.models import DecoderConfig
from kvjax.models.parameters import walk
from kvjax.models.sharding import check_mesh, spec
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.sizes import show_size

Plan = dict[str, int]  # bytes by purpose
Devices = Mesh | AbstractMesh | None


class InsufficientMemoryError(MemoryError):
    """The engine does not fit; the message says what is needed, what is free, and what to change."""


def plan(caches: CacheConfig, mesh: Devices = None) -> Plan:
    """What an engine takes on all devices together, or with a mesh what each of its devices takes.

    Everything but "temporaries" is exact. Those are the intermediate results of the largest step, added up as if none
    of them were fused away or shared memory with another; XLA needs less.

    Raises:
        ValueError: the mesh does not cut the model's heads into equal parts.
    """
    model, layout, groups = caches.model, caches.layout, caches.groups
    longest = layout.buckets[-1]
    item = jnp.dtype(layout.dtype).itemsize
    workspace = [caches.workspace(longest)] * max(map(len, groups))
    part = _part(model, mesh)
    return {
        "weights": sum(weights(model, layout.dtype, mesh).values()),
        "views": cache.nbytes(caches.views, mesh),
        "decode state": cache.nbytes(DecodeState.declare(layout.max_num_seqs, model.vocab_size), mesh),
        "workspaces": cache.nbytes(workspace, mesh) * len(groups[:2]),
        "hidden states": longest * model.width * item,
        "temporaries": max(
            _prefill_temporaries(part, min(layout.prefill_chunk_size, longest), item), _head_temporaries(part, layout)
        ),
    }


@functools.lru_cache(maxsize=4)  # who looks for the most slots asks again and again
def weights(model: DecoderConfig, dtype: str, mesh: Devices = None) -> Mapping[str, int]:
    """Bytes of each parameter by its path, on all devices or with a mesh on each of its devices."""
    found = {}
    for path, param in walk(models.abstract(model, dtype)):
        shape = param.shape
        if mesh is not None:
            shape = NamedSharding(mesh, spec(param.get_metadata()["axes"])).shard_shape(shape)
        found[path] = math.prod(shape) * jnp.dtype(param.dtype).itemsize
    return MappingProxyType(found)


def _part(model: DecoderConfig, mesh: Devices) -> DecoderConfig:
    """What each device of a mesh computes of a model. Logits are whole: sampling sorts them."""
    if mesh is None:
        return model
    check_mesh(model, mesh)
    sizes = ("num_heads", "num_kv_heads", "mlp_width")
    return dataclasses.replace(model, **{name: getattr(model, name) // mesh.size for name in sizes})


def _prefill_temporaries(model: DecoderConfig, chunk: int, item: int) -> int:
    """One layer over one chunk."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    activations = chunk * (4 * model.width + 3 * queries + 4 * keys + 3 * model.mlp_width) * item
    block = min(PREFILL_BLOCK, chunk)
    scores = 3 * model.num_heads * chunk * block * 4  # scores, mask and weights of one block of keys
    carry = 2 * model.num_heads * chunk * (model.head_dim + 2) * 4
    return activations + scores + carry + 2 * keys * block * item


def _head_temporaries(model: DecoderConfig, layout: ResolvedConfig) -> int:
    """Logits: sampling sorts those of all slots, with their ids; a prompt's own are made `SCORED_ROWS` at a time."""
    rows = max(8 * layout.max_num_seqs, 4 * min(SCORED_ROWS, layout.prefill_chunk_size))
    scores = 3 * layout.max_num_seqs * model.num_heads * DECODE_BLOCK * 4
    return rows * model.vocab_size * 4 + scores


def free_bytes() -> int | None:
    """Bytes that are free on all devices together; None if this machine does not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return sum(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def check_fits(model: DecoderConfig, layout: ResolvedConfig, free: int | None) -> None:
    """Refuses a layout that does not fit in `free` bytes, and names the change that makes it fit.

    Raises:
        InsufficientMemoryError: it does not fit.
    """

    def parts(layout: ResolvedConfig) -> Plan:
        return plan(CacheConfig.declare(model, layout))

    def needed(layout: ResolvedConfig) -> int:
        return sum(parts(layout).values())

    def with_length(blocks: int) -> ResolvedConfig:
        return dataclasses.replace(layout, max_model_len=blocks * BLOCK_TOKENS)

    if free is None or needed(layout) <= free:
        return
    fewer = most_slots(model, layout, free, layout.max_num_seqs - 1)
    shorter = _largest(lambda blocks: needed(with_length(blocks)) <= free, (layout.max_model_len - 1) // BLOCK_TOKENS)
    if fewer:
        way_out = (
            f"--max-num-seqs {fewer} fits, that is so many conversations at a time instead of {layout.max_num_seqs}"
        )
    elif shorter:
        way_out = (
            f"--max-model-len {shorter * BLOCK_TOKENS} fits, instead of {layout.max_model_len} tokens a conversation"
        )
    else:
        way_out = "no context fits beside the weights: spread them over more devices with --tensor-parallel-size"
        if layout.dtype == "float32":
            way_out += ", or halve them with --dtype bfloat16"
    listed = ", ".join(f"{purpose} {show_size(value)}" for purpose, value in parts(layout).items())
    raise InsufficientMemoryError(
        f"{show_size(needed(layout))} of memory are needed ({listed}) and {show_size(free)} are free; {way_out}"
    )


def most_slots(model: DecoderConfig, layout: ResolvedConfig, free: int, upper: int, mesh: Devices = None) -> int:
    """How many slots fit in `free` bytes, of each device of a mesh if there is one: at most `upper`, 0 if none does."""

    def fits(slots: int) -> bool:
        caches = CacheConfig.declare(model, dataclasses.replace(layout, max_num_seqs=slots))
        return sum(plan(caches, mesh).values()) <= free

    return _largest(fits, upper)


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest n in [1, upper] that fits, 0 if none does; what is larger than one that does not, does not."""
    low = 0
    while low < upper:
        middle = (low + upper + 1) // 2
        low, upper = (middle, upper) if fits(middle) else (low, middle - 1)
    return low
