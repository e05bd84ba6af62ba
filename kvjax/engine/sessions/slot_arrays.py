"""Slot arrays: one slot's part of every array, taken out and put back, so that a conversation can leave and return.

Compiled like the steps, and donated like them: the arrays of the other slots are not touched. Static are the arrays'
own specs, of one declaration with their allocation, or the shardings that they have.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kvjax import cache
from kvjax.cache import View
from kvjax.engine.device.steps import DecodeState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotArrays:
    """All that a decode step reads and writes. Leaves are arrays, or specs of them; of all slots, or of one.

    Attributes:
        views: one a layer.
    """

    views: tuple[View, ...]
    state: DecodeState

    @property
    def length(self) -> Any:
        """Tokens whose KV is computed: the position of the last one drawn, whose is not."""
        return self.state.position

    @property
    def used(self) -> list[int]:
        """Entries ever written to each view of one slot."""
        return [int(view.used) for view in self.views]


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_slot(specs: SlotArrays, mesh: Mesh | None, arrays: SlotArrays, slot: Int[Array, ""]) -> SlotArrays:
    """A copy of one slot's part."""
    row = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), arrays)
    return cache.constrain(row, cache.rows(specs), mesh)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert_slot(shardings: SlotArrays | None, arrays: SlotArrays, row: SlotArrays, slot: Int[Array, ""]) -> SlotArrays:
    """The arrays with one slot's part replaced. The slot does not decode before `wake`."""
    row = dataclasses.replace(row, state=dataclasses.replace(row.state, active=row.state.active & False))
    new = jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, slot, 0), arrays, row)
    return new if shardings is None else jax.lax.with_sharding_constraint(new, shardings)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def wake(shardings: DecodeState | None, state: DecodeState, slot: Int[Array, ""]) -> DecodeState:
    """Sets a slot decoding from where it stands."""
    new = dataclasses.replace(state, active=state.active.at[slot].set(True))
    return new if shardings is None else jax.lax.with_sharding_constraint(new, shardings)


def shardings[T](arrays: T, mesh: Mesh | None) -> T | None:
    """How arrays lie on a mesh now, to be kept so: steps are compiled for it, and choose some of it themselves."""
    return None if mesh is None else jax.tree.map(lambda array: array.sharding, arrays)
