"""How a prompt is read with kernels: what attends a chunk to its workspace, and what stage 1 looks at the whole with.

Over several devices each reads the workspace of its own kv heads, and nothing passes between them. Choosing the best
scores, and gathering what they choose, stay XLA's.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.attention import views
from kvjax.attention.eviction import Observation
from kvjax.attention.methods import LayerCacheConfig
from kvjax.cache import TENSOR, SlotLimits, View, Workspace
from kvjax.pallas.dispatch import REFERENCE
from kvjax.pallas.observation_scores import attention_received
from kvjax.pallas.prefill_attention import prefill_attention

_HEADS, _KV_HEADS, _ALL = PartitionSpec(None, TENSOR), PartitionSpec(TENSOR), PartitionSpec()


def attend(
    workspace: Workspace,
    q: Float[Array, "P H D"],
    start: Int[Array, ""],
    *,
    scale: float,
    window: int | None,
    implementation: str | None = REFERENCE,
    mesh: Mesh | None = None,
) -> Float[Array, "P H D"]:
    """Attends a chunk to a workspace that holds its keys already, see `dense.prefill_attention`.

    Args:
        implementation: see `dispatch`.
        mesh: the devices over whose axis "tensor" heads are split.

    Raises:
        NotImplementedError: one is asked for by name, and it does not serve the case.
    """
    part = functools.partial(prefill_attention, scale=scale, window=window, implementation=implementation)
    split = _split(part, (_HEADS, _KV_HEADS, _KV_HEADS, _ALL), _HEADS, implementation, mesh)
    return split(q, workspace.k, workspace.v, start)


def write_slot(
    plan: LayerCacheConfig,
    view: View,
    workspace: Workspace,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    limits: SlotLimits,
    *,
    scale: float,
    implementation: str | None = REFERENCE,
    mesh: Mesh | None = None,
) -> View:
    """As `views.write_slot`. A layer that looks at no query has nothing to choose here, and no name is refused for it.

    Args:
        implementation, mesh: as for `attend`.

    Raises:
        NotImplementedError: one is asked for by name, and it does not serve the case.
    """

    def received(*arrays: Array, scale: float, per_head: bool) -> Float[Array, "R T"]:
        part = functools.partial(attention_received, scale=scale, per_head=per_head, implementation=implementation)
        return _split(part, (_HEADS, _KV_HEADS, _ALL, _ALL), _KV_HEADS, implementation, mesh)(*arrays)

    if isinstance(plan.eviction, Observation):
        plan = replace(plan, eviction=replace(plan.eviction, received=received))
    return views.write_slot(plan, view, workspace, slot, length, limits, scale=scale)


def _split(
    part: Callable[..., Any],
    inputs: tuple[PartitionSpec, ...],
    output: PartitionSpec,
    name: str | None,
    mesh: Mesh | None,
) -> Callable[..., Any]:
    """A part for the heads of each device. XLA splits jax.numpy by itself, and cannot look into a kernel."""
    if mesh is None or name == REFERENCE:
        return part
    # a kernel does not say over which axes its output varies
    return jax.shard_map(part, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
