"""The KV caches on the device. Each array is declared once; allocation, size and sharding derive from that.

A `Workspace` holds the full K and V of one layer while its group is prefilled; a `View` holds what each slot
keeps of a layer for decoding. Both are donated to every step and updated in place: they are never copied.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

TENSOR = "tensor"  # the mesh axis over which kv heads are split


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a cache: its shape, its dtype, the mesh axis of each dimension, and its first value."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]
    fill: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def row(self) -> "ArraySpec":
        """What one slot has of an array with the slots in front."""
        return dataclasses.replace(self, shape=self.shape[1:], axes=self.axes[1:])

    def sharding(self, mesh: Mesh | AbstractMesh) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*self.axes))

    def shard(self, mesh: Mesh | AbstractMesh) -> "ArraySpec":
        """What one device of a mesh has of it."""
        return dataclasses.replace(self, shape=self.sharding(mesh).shard_shape(self.shape))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
    """Full K and V of one layer for one request, during prefill. Leaves are arrays, or specs of them.

    Attributes:
        queries: the last W, position p in row p mod W; None where nothing is chosen by them.
    """

    k: Any  # [K, T, D]
    v: Any  # [K, T, D]
    queries: Any = None  # [W, H, D]

    @classmethod
    def declare(
        cls, *, kv_heads: int, tokens: int, head_dim: int, dtype: Any, window: int = 0, query_heads: int = 0
    ) -> "Workspace":
        """Specs; `window` is W, 0 for none."""
        spec = ArraySpec((kv_heads, tokens, head_dim), dtype, (TENSOR, None, None))
        queries = ArraySpec((window, query_heads, head_dim), dtype, (None, TENSOR, None)) if window else None
        return cls(spec, spec, queries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotLimits:
    """What a request may have of one layer: numbers for one slot, arrays for all, or specs of these.

    Attributes:
        max_retained: most tokens that stage 1 keeps.
        max_selected: most entries that stage 2 attends to.
        dense_threshold: with at most so many entries a step reads them all.
        turn_start: where the last turn of its conversation begins: stage 1 looks from there on only. 0 for anywhere.
    """

    max_retained: Any  # [B] int32
    max_selected: Any  # [B] int32
    dense_threshold: Any  # [B] int32
    turn_start: Any  # [B] int32

    @classmethod
    def declare(cls, slots: int) -> "SlotLimits":
        number = ArraySpec((slots,), jnp.int32, (None,))
        return cls(number, number, number, number)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What each slot keeps of one layer. Leaves are arrays, or specs of them.

    A new entry goes to index `used % C`. A full view never wraps; that of a sliding layer is a ring that
    forgets what its window has left behind. Attention reads entries by `positions`, never by their order.

    Attributes:
        bounds: of each page of S entries the elementwise maximum and minimum of its keys; None without stage 2.
        queries: the last W, position p in row p mod W; None where a full view is not selected again.
        limits: of each slot's request; None where nothing is chosen.
    """

    k: Any  # [B, K, C, D], rotated for the position it was computed at
    v: Any  # [B, K, C, D]
    positions: Any  # [B, K, C] int32: the token position of each entry, -1 where empty
    used: Any  # [B] int32: entries ever written to the slot
    bounds: Any = None  # [B, K, P, 2, D]
    queries: Any = None  # [B, W, H, D]
    limits: SlotLimits | None = None

    @classmethod
    def declare(
        cls,
        *,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: Any,
        page_size: int = 0,
        bounds_dtype: Any = None,
        window: int = 0,
        query_heads: int = 0,
        chooses: bool = False,
    ) -> "View":
        """Specs; a `page_size` or a `window` (W) of 0 is for views without bounds or queries.

        Bounds are of the keys' dtype where they have none of their own.
        """
        heads = ArraySpec((slots, kv_heads, capacity, head_dim), dtype, (None, TENSOR, None, None))
        positions = ArraySpec(heads.shape[:3], jnp.int32, (None, TENSOR, None), fill=-1)
        bounds = queries = None
        if page_size:
            pages = math.ceil(capacity / page_size)
            bounds = ArraySpec(
                (slots, kv_heads, pages, 2, head_dim), bounds_dtype or dtype, (None, TENSOR, None, None, None)
            )
        if window:
            queries = ArraySpec((slots, window, query_heads, head_dim), dtype, (None, None, TENSOR, None))
        limits = SlotLimits.declare(slots) if chooses else None
        return cls(heads, heads, positions, ArraySpec((slots,), jnp.int32, (None,)), bounds, queries, limits)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, ArraySpec)


def rows(specs: Any) -> Any:
    """Specs of one slot for a pytree of specs of all slots."""
    return jax.tree.map(lambda spec: spec.row, specs, is_leaf=_is_spec)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree of arrays or specs, each under its path: `views.3.k`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unnamed(leaves: Mapping[str, Any], like: Any) -> Any:
    """The pytree whose `named` leaves these are; `like` has its structure. Raises KeyError if one is missing."""
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=_is_spec), [leaves[name] for name in named(like)])


def allocate(specs: Any, mesh: Mesh | None = None) -> Any:
    """Arrays for a pytree of specs, each filled with its first value on the device it will live on."""

    def fill(spec: ArraySpec) -> jax.Array:
        device = None if mesh is None else spec.sharding(mesh)
        return jnp.full(spec.shape, spec.fill, spec.dtype, device=device)

    return jax.tree.map(fill, specs, is_leaf=_is_spec)


def constrain(arrays: Any, specs: Any, mesh: Mesh | None) -> Any:
    """Holds arrays inside a jitted step to the sharding they were allocated with, so that donation keeps them."""
    if mesh is None:
        return arrays
    shardings = jax.tree.map(lambda spec: spec.sharding(mesh), specs, is_leaf=_is_spec)
    return jax.tree.map(jax.lax.with_sharding_constraint, arrays, shardings)


def nbytes(specs: Any, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Bytes of all arrays of a pytree of specs: over all devices, or with a mesh on each of its devices."""

    def size(spec: ArraySpec) -> int:
        return spec.nbytes if mesh is None else spec.shard(mesh).nbytes

    return sum(size(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))
