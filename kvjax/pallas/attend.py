"""How a decode step reads a view with kernels: `attention.views.attend` for every device, with the operations chosen.

Appending to a view and installing one stay XLA's: they write a few rows in place. Over several devices each reads the
views of its own kv heads, and nothing passes between them; XLA, which cannot look into a kernel, is not asked to split.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import views
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.selection import HybridPages
from kvjax.cache import TENSOR, ArraySpec, View
from kvjax.pallas.decode_attention import decode_attention
from kvjax.pallas.dispatch import REFERENCE
from kvjax.pallas.page_scores import page_scores
from kvjax.pallas.page_selection import page_selection
from kvjax.pallas.selected_attention import selected_attention


def attend(
    plan: LayerCacheConfig,
    view: View,
    q: Float[Array, "B H D"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
    *,
    scale: float,
    window: int | None,
    implementation: str | None = REFERENCE,
    mesh: Mesh | None = None,
) -> Float[Array, "B H D"]:
    """Attends one token a slot to what its view holds, or to what stage 2 selects of that.

    Args:
        implementation: of every operation, see `dispatch`. None takes the reference for layers without kernels.
        mesh: the devices over whose axis "tensor" heads are split.

    Raises:
        NotImplementedError: one is asked for by name, and the layer or an operation of it is not served.
    """
    reason = _unserved(plan, window)
    if reason is not None and implementation not in (None, REFERENCE):
        raise NotImplementedError(reason)
    if reason is not None or implementation == REFERENCE:
        return views.attend(plan, view, q, position, active, scale=scale, window=window)
    part = functools.partial(_attend, plan, scale=scale, implementation=implementation)
    if mesh is None:
        return part(view, q, active)
    view = dataclasses.replace(view, queries=None)  # which nothing reads here
    heads = PartitionSpec(None, TENSOR)
    split = jax.shard_map(  # a kernel does not say over which axes its outputs vary
        part, mesh=mesh, in_specs=(_specs(view), heads, PartitionSpec()), out_specs=heads, check_vma=False
    )
    return split(view, q, active)


def _specs(view: View) -> View:
    """How a view lies on a mesh, as it was declared."""
    slots, kv_heads, capacity, head_dim = view.k.shape
    declared = View.declare(
        slots=slots,
        kv_heads=kv_heads,
        capacity=capacity,
        head_dim=head_dim,
        dtype=view.k.dtype,
        page_size=0 if view.bounds is None else 1,
        chooses=view.limits is not None,
    )
    return jax.tree.map(
        lambda spec: PartitionSpec(*spec.axes), declared, is_leaf=lambda leaf: isinstance(leaf, ArraySpec)
    )


def _attend(
    plan: LayerCacheConfig,
    view: View,
    q: Float[Array, "B H D"],
    active: Bool[Array, "B"],
    *,
    scale: float,
    implementation: str | None,
) -> Float[Array, "B H D"]:
    """For the heads of one device."""
    entries = jnp.where(active, jnp.minimum(view.used, view.k.shape[2]), 0)
    if plan.selection is None:
        return decode_attention(q, view.k, view.v, entries, scale=scale, implementation=implementation)
    selection, page = plan.selection, plan.selection.unit
    grouped = q.reshape(q.shape[0], view.k.shape[1], -1, q.shape[2])
    scores = page_scores(grouped, view.bounds, entries, page_size=page, scale=scale, implementation=implementation)
    tokens, dense = (
        (None, selection.dense_threshold)
        if view.limits is None
        else (view.limits.max_selected, view.limits.dense_threshold)
    )
    most = None if tokens is None else tokens // page
    count = selection.tokens // page
    chosen = page_selection(scores, entries, page_size=page, count=count, most=most, implementation=implementation)
    out = selected_attention(
        grouped, view.k, view.v, entries, chosen, page_size=page, scale=scale, implementation=implementation
    ).reshape(q.shape)
    if selection.dense_threshold == 0:
        return out
    few = entries <= dense  # a slot that is not dense has no entries there, and costs nothing
    whole = decode_attention(q, view.k, view.v, jnp.where(few, entries, 0), scale=scale, implementation=implementation)
    return jnp.where(few[:, None, None], whole, out)


def _unserved(plan: LayerCacheConfig, window: int | None) -> str | None:
    """Why no kernel serves a layer; None where some do."""
    if plan.selection is not None and type(plan.selection) is not HybridPages:
        return f"{type(plan.selection).__name__} scores in jax.numpy alone: kernels score the pages of HybridPages"
    if plan.selection is None and window is not None:
        return f"a sliding window of {window}: its ring has no order, and kernels read a view's first entries"
    if plan.head_max_retained:
        return "views of unlike kv heads have gaps, and kernels read a view's first entries"
    return None
