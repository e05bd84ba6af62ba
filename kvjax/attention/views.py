"""Operations on views: a prompt is written, a token appended, a decode step reads, a full view is selected again.

All by a `LayerCacheConfig`, which is static: a layer without stages has exactly the dense path.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.attention import decode
from kvjax.attention.eviction import PromptState
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.observation import last_queries
from kvjax.attention.ops import REFERENCE_OPS, Ops, PageView
from kvjax.attention.pages import summarize, update
from kvjax.attention.retention import gather
from kvjax.cache import SlotLimits, View, Workspace


def write_slot(
    plan: LayerCacheConfig,
    view: View,
    workspace: Workspace,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    limits: SlotLimits,
    *,
    scale: float,
    ops: Ops = REFERENCE_OPS,
) -> View:
    """Writes to a slot what a view keeps of a finished prompt of `length` tokens, on the `limits` of its request.

    Without stage 1 entry j is the last position that is j mod C: for a full view every position in order, for a
    sliding layer the last C of them as its ring has them.
    """
    if view.limits is not None:
        view = replace(view, limits=jax.tree.map(lambda slots, one: slots.at[slot].set(one), view.limits, limits))
    if plan.eviction is None:
        return _write(plan, view, slot, *_last_entries(workspace, view.k.shape[2], length), length)
    queries = last_queries(workspace.queries, length)[-plan.window :]
    state = PromptState(queries, workspace.k, workspace.v, length, limits.turn_start, scale=scale, ops=ops)
    positions = plan.eviction.select(
        state,
        max_retained=plan.max_retained,
        capacity=view.k.shape[2],
        budget=limits.max_retained
        if plan.head_max_retained is None
        else jnp.minimum(limits.max_retained, jnp.array(plan.head_max_retained)[:, None]),
    )
    retained = gather(workspace, positions)
    view = _write(plan, view, slot, retained.k[0], retained.v[0], positions, retained.used[0])
    if view.queries is None:
        return view
    return replace(view, queries=view.queries.at[slot].set(jnp.roll(queries, length, axis=0)))


def append(
    plan: LayerCacheConfig,
    view: View,
    q: Float[Array, "B H D"],
    k: Float[Array, "B K D"],
    v: Float[Array, "B K D"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
) -> View:
    """Adds one entry to each active slot. Other slots are left untouched: one may be receiving a new prompt."""
    slots, heads, capacity, _ = view.k.shape
    index = view.used % capacity
    # an idle slot's index lies outside, and what is written there is dropped; each head has its own row, or XLA would
    # want the heads of an entry side by side on a TPU, and copy the views from and to that order at every step
    at = (jnp.arange(slots)[:, None], jnp.arange(heads), jnp.where(active, index, capacity)[:, None])

    def write(target: Array, value: Array) -> Array:
        value = jnp.repeat(value, heads // value.shape[1], axis=1) if value.ndim == 3 else value
        return target.at[at].set(value.astype(target.dtype), mode="drop", unique_indices=True)

    places = jnp.broadcast_to(position[:, None], view.positions.shape[:2])
    new = replace(
        view,
        k=write(view.k, k),
        v=write(view.v, v),
        positions=write(view.positions, places),
        used=view.used + active.astype(jnp.int32),
    )
    if view.bounds is not None:
        new = replace(new, bounds=update(view.bounds, new.k, new.positions, index, active, plan.page_size))
    if view.queries is not None:
        window = view.queries.shape[1]
        row = (jnp.arange(slots), jnp.where(active, position % window, window))
        new = replace(new, queries=view.queries.at[row].set(q.astype(view.queries.dtype), mode="drop"))
    return new


def attend(
    plan: LayerCacheConfig,
    view: View,
    q: Float[Array, "B H D"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
    *,
    scale: float,
    window: int | None,
    ops: Ops = REFERENCE_OPS,
) -> Float[Array, "B H D"]:
    """Attends one token a slot to what its view holds, or to what stage 2 selects of that."""
    pages = PageView(
        q.reshape(q.shape[0], view.k.shape[1], -1, q.shape[2]),
        view.k,
        view.v,
        view.positions,
        position,
        jnp.where(active, jnp.minimum(view.used, view.k.shape[2]), 0),
        view.bounds,
        scale=scale,
        contiguous=plan.head_max_retained is None,
        ops=ops,
    )
    tokens, dense = (None, None) if view.limits is None else (view.limits.max_selected, view.limits.dense_threshold)
    return decode.attend(pages, plan.selection, tokens, dense, window=window).reshape(q.shape)


def entries(
    view: View, slot: Int[Array, ""], start: Int[Array, ""], *, count: int, kv_heads: int
) -> tuple[Float[Array, "N K D"], Float[Array, "N K D"], Bool[Array, "N"]]:
    """K and V of `count` tokens from position `start` on, as a slot holds them, and whether it does, in all its heads.

    For tokens that were appended: they lie one behind the other, so the last one's place tells that of each.
    """
    rows, capacity = view.k.shape[1:3]
    positions = start + jnp.arange(count)
    last = (view.used[slot] - 1) % capacity
    index = (last - view.positions[slot, 0, last] + positions) % capacity
    held = jnp.all(view.positions[slot, :, index] == positions[:, None], axis=1)
    # gathered at once: the whole of a slot's view is never copied
    k, v = (source[slot, :, index][:, :: rows // kv_heads] for source in (view.k, view.v))
    return k, v, held


def reselect(plan: LayerCacheConfig, view: View, slot: Int[Array, ""], length: Int[Array, ""], *, scale: float) -> View:
    """Cuts a slot back to what its limits retain, by its last queries: so an output may be longer than a view.

    What a view has dropped does not come back: the choice is among what it holds.

    Args:
        length: tokens of the sequence so far, by which the ring of queries is ordered.
    """
    assert plan.eviction is not None
    k, v, held, used, queries, limits = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False),
        (view.k, view.v, view.positions, view.used, view.queries, view.limits),
    )
    # entries are in the order of their positions, the window's last: their index serves as a position
    turn_start = used - (length - limits.turn_start)
    state = PromptState(last_queries(queries, length), k, v, used, turn_start, scale=scale)
    index = plan.eviction.select(state, max_retained=plan.max_retained, capacity=k.shape[1], budget=limits.max_retained)
    retained = gather(Workspace(k, v), index)
    positions = jnp.where(index >= 0, jnp.take_along_axis(held, jnp.maximum(index, 0), axis=1), -1)
    return _write(plan, view, slot, retained.k[0], retained.v[0], positions, retained.used[0])


def _last_entries(
    workspace: Workspace, capacity: int, length: Int[Array, ""]
) -> tuple[Float[Array, "K N D"], Float[Array, "K N D"], Int[Array, "K C"]]:
    kv_heads, tokens, _ = workspace.k.shape
    entries = min(capacity, tokens)
    retained = length - 1 - (length - 1 - jnp.arange(entries)) % capacity
    positions = jnp.full((kv_heads, capacity), -1, jnp.int32).at[:, :entries].set(jnp.maximum(retained, -1))
    if tokens <= capacity:  # entry j is position j; a gather of every entry takes several times as long as the copy
        return workspace.k, workspace.v, positions
    start = jnp.maximum(length - capacity, 0)

    def ring(source: Array) -> Array:
        last = jax.lax.dynamic_slice_in_dim(source, start, capacity, axis=1)
        return jax.lax.cond(start > 0, lambda: jnp.roll(last, start, axis=1), lambda: last)

    return ring(workspace.k), ring(workspace.v), positions


def _write(
    plan: LayerCacheConfig,
    view: View,
    slot: Int[Array, ""],
    k: Float[Array, "K N D"],
    v: Float[Array, "K N D"],
    positions: Int[Array, "K C"],
    used: Int[Array, ""],
) -> View:
    """A slot's first N entries, all of its positions, and the summary of its pages."""

    def write(target: Array, rows: Array) -> Array:
        start = (slot, *[0] * rows.ndim)
        return jax.lax.dynamic_update_slice(target, rows[None].astype(target.dtype), start)

    new = replace(
        view,
        k=write(view.k, k),
        v=write(view.v, v),
        positions=view.positions.at[slot].set(positions),
        used=view.used.at[slot].set(used),
    )
    if view.bounds is None:
        return new
    bounds = summarize(k, positions[:, : k.shape[1]] >= 0, plan.page_size, view.bounds.dtype)
    return replace(new, bounds=write(view.bounds, bounds))
