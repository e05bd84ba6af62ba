"""Compiled steps: pure functions from arrays to arrays. They know no requests, no queue and no host state.

Caches and hidden states are donated and updated in place. A prefill step is one layer over one chunk, so that one
compiled body serves every layer of its kind; a decode dispatch is a loop of whole-model steps over all slots.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from kvjax.attention import views
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.observation import observe
from kvjax.cache import ArraySpec, SlotLimits, View, Workspace, constrain
from kvjax.engine.device.sampling import SamplerState, TokenSample, report, sample
from kvjax.engine.device.split_model import LayerKind, Part
from kvjax.models import Decoder
from kvjax.pallas.ops import backend_ops

SCORED_ROWS = 64  # prompt positions whose logits exist at a time


_Layer = tuple[LayerKind, LayerCacheConfig, tuple[Array, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Where each slot stands. Leaves are arrays, or specs of them.

    Attributes:
        token: the last token drawn, not yet in the cache; `position` is its position.
        generated: tokens drawn so far; `limit` is where the slot stops by itself.
        active: the slot is decoding.
    """

    token: Any  # [B] int32
    position: Any  # [B] int32
    generated: Any  # [B] int32
    limit: Any  # [B] int32
    active: Any  # [B] bool
    sampler: SamplerState

    @classmethod
    def declare(cls, slots: int, vocab_size: int) -> "DecodeState":
        number = ArraySpec((slots,), jnp.int32, (None,))
        active = ArraySpec((slots,), jnp.bool_, (None,))
        return cls(number, number, number, number, active, SamplerState.declare(slots, vocab_size))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What a decode dispatch produced: row i is step i, and `emitted` says which slots drew a token in it."""

    emitted: Any  # [N, B] bool
    sample: TokenSample  # [N, B, ...]


@functools.partial(jax.jit, static_argnums=0)
def embed(part: Part[Decoder], leaves: tuple[Array, ...], tokens: Int[Array, "T"]) -> Float[Array, "T E"]:
    """Hidden states before the first layer."""
    return part.merge(leaves).embed(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def prefill_layer(
    kind: LayerKind,
    chunk: int,
    leaves: tuple[Array, ...],
    hidden: Float[Array, "T E"],
    workspace: Workspace,
    start: Int[Array, ""],
    length: Int[Array, ""],
) -> tuple[Float[Array, "T E"], Workspace]:
    """Pushes positions `start` to `start + chunk - 1` through one layer; its K and V enter the workspace.

    So do its queries, as far as they are among the last of the prompt's `length`, where a layer chooses by them.
    """
    specs = _workspace_specs(workspace)

    def attend(q: Array, k: Array, v: Array) -> Array:
        nonlocal workspace
        k, v = (x.transpose(1, 0, 2) for x in (k, v))  # [P, K, D] to [K, P, D]
        workspace = Workspace(
            jax.lax.dynamic_update_slice_in_dim(workspace.k, k.astype(workspace.k.dtype), start, axis=1),
            jax.lax.dynamic_update_slice_in_dim(workspace.v, v.astype(workspace.v.dtype), start, axis=1),
            None if workspace.queries is None else observe(workspace.queries, q, start, length),
        )
        ops = backend_ops(kind.attention_backend, kind.mesh)
        return ops.prefill_attention(q, workspace.k, workspace.v, start, scale=kind.scale, window=kind.window)

    x = kind.part.merge(leaves)(jax.lax.dynamic_slice_in_dim(hidden, start, chunk), start + jnp.arange(chunk), attend)
    hidden = jax.lax.dynamic_update_slice_in_dim(hidden, x, start, axis=0)
    return hidden, constrain(workspace, specs, kind.mesh)


@functools.partial(jax.jit, static_argnums=0)
def slice_chunk(
    chunk: int, workspace: Workspace, start: Int[Array, ""]
) -> tuple[Float[Array, "K P D"], Float[Array, "K P D"]]:
    """K and V of one chunk of a workspace."""
    return (
        jax.lax.dynamic_slice_in_dim(workspace.k, start, chunk, axis=1),
        jax.lax.dynamic_slice_in_dim(workspace.v, start, chunk, axis=1),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def load_blocks(
    mesh: Mesh | None,
    workspace: Workspace,
    blocks: tuple[tuple[Float[Array, "K C D"], Float[Array, "K C D"]], ...],
    start: Int[Array, ""],
) -> tuple[Workspace, Float[Array, ""]]:
    """Puts a chunk back that `slice_chunk` gave, in equal parts; the scalar is there once no part is read any more."""
    k, v = workspace.k, workspace.v
    for index, (block_k, block_v) in enumerate(blocks):
        at = start + index * block_k.shape[1]
        k = jax.lax.dynamic_update_slice_in_dim(k, block_k, at, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(v, block_v, at, axis=1)
    new = constrain(dataclasses.replace(workspace, k=k, v=v), _workspace_specs(workspace), mesh)
    return new, new.k[0, 0, 0] + new.v[0, 0, 0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def write_slot(
    kind: LayerKind,
    plan: LayerCacheConfig,
    view: View,
    workspace: Workspace,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    limits: SlotLimits,
) -> View:
    """Writes what a view keeps of a finished workspace to a slot."""
    new = views.write_slot(plan, view, workspace, slot, length, limits, **kind.reading)
    return constrain(new, _view_specs(plan, view), kind.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def reselect(kind: LayerKind, plan: LayerCacheConfig, view: View, slot: Int[Array, ""], length: Int[Array, ""]) -> View:
    """Makes room in a slot's view after `length` tokens of its sequence."""
    new = views.reselect(plan, view, slot, length, scale=kind.scale)
    return constrain(new, _view_specs(plan, view), kind.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gather_tokens(
    count: int, kv_heads: int, caches: tuple[View, ...], slot: Int[Array, ""], start: Int[Array, ""]
) -> tuple[tuple[Float[Array, "N K D"], Float[Array, "N K D"], Bool[Array, "N"]], ...]:
    """K and V of `count` generated tokens from position `start` on in each layer, and which of them a slot holds."""
    return tuple(views.entries(view, slot, start, count=count, kv_heads=kv_heads) for view in caches)


@functools.partial(jax.jit, static_argnums=0)
def rows(count: int, hidden: Float[Array, "T E"], start: Int[Array, ""]) -> Float[Array, "N E"]:
    """`count` rows of the hidden states from `start` on."""
    return jax.lax.dynamic_slice_in_dim(hidden, start, count)


@functools.partial(jax.jit, static_argnums=0)
def score(
    part: Part[Decoder], leaves: tuple[Array, ...], x: Float[Array, "P E"], targets: Int[Array, "P"]
) -> TokenSample:
    """The log-probability of each target after the hidden state at its place, and the most likely tokens."""
    decoder = part.merge(leaves)

    def block(pair: tuple[Array, Array]) -> TokenSample:
        return report(decoder.head(pair[0]), pair[1], jnp.bool_(True))

    rows = math.gcd(SCORED_ROWS, len(targets))
    blocks = (x.reshape(-1, rows, x.shape[-1]), targets.reshape(-1, rows))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), jax.lax.map(block, blocks))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def first_token(
    part: Part[Decoder],
    leaves: tuple[Array, ...],
    state: DecodeState,
    last: Float[Array, "1 E"],
    slot: Int[Array, ""],
    length: Int[Array, ""],
    limit: Int[Array, ""],
    sampler: SamplerState,
) -> tuple[TokenSample, DecodeState]:
    """Draws the first token after a prompt of `length` tokens, and sets the slot decoding from there."""
    sampler = jax.tree.map(lambda x: x[None], sampler)
    drawn, sampler = sample(part.merge(leaves).head(last), sampler, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.bool_))
    ended = jnp.any(drawn.token[:, None] == sampler.stop_token_ids, axis=-1) | (limit <= 1)
    one = jnp.ones(1, jnp.int32)
    row = DecodeState(drawn.token, length * one, one, limit * one, ~ended, sampler)
    return drawn, jax.tree.map(lambda all_slots, new: all_slots.at[slot].set(new[0]), state, row)


@functools.partial(jax.jit, donate_argnums=0)
def constrain_slot(state: DecodeState, slot: Int[Array, ""], allowed: UInt32[Array, "W"]) -> DecodeState:
    """Sets the tokens that a constrained slot may draw next, a bit a token."""
    sampler = dataclasses.replace(state.sampler, allowed=state.sampler.allowed.at[slot].set(allowed))
    return dataclasses.replace(state, sampler=sampler)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6, 7))
def decode(
    part: Part[Decoder],
    kinds: tuple[LayerKind, ...],
    plans: tuple[LayerCacheConfig, ...],
    most: int,
    leaves: tuple[Array, ...],
    layer_leaves: tuple[tuple[Array, ...], ...],
    caches: tuple[View, ...],
    state: DecodeState,
    alive: Bool[Array, "B"],
    steps: Int[Array, ""],
) -> tuple[Steps, tuple[View, ...], DecodeState]:
    """Up to `steps` (at most `most`) decode steps over all slots; ends early when no slot is active.

    `alive` is decided on the host: a slot that is not alive stops for good.
    """
    decoder = part.merge(leaves)
    state = dataclasses.replace(state, active=state.active & alive)
    layers = tuple(zip(kinds, plans, layer_leaves, strict=True))
    out = jax.eval_shape(lambda s: _step(decoder, layers, caches, s)[0], state)
    out = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), out)

    def unfinished(carry: Any) -> Bool[Array, ""]:
        index, _, state, _ = carry
        return (index < steps) & jnp.any(state.active)

    def body(carry: Any) -> Any:
        index, caches, state, out = carry
        new, caches, state = _step(decoder, layers, caches, state)
        return index + 1, caches, state, jax.tree.map(lambda all_steps, x: all_steps.at[index].set(x), out, new)

    _, caches, state, out = jax.lax.while_loop(unfinished, body, (jnp.int32(0), caches, state, out))
    return out, caches, state


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def extend(
    part: Part[Decoder],
    kinds: tuple[LayerKind, ...],
    plans: tuple[LayerCacheConfig, ...],
    leaves: tuple[Array, ...],
    layer_leaves: tuple[tuple[Array, ...], ...],
    caches: tuple[View, ...],
    tokens: Int[Array, "N"],
    slot: Int[Array, ""],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[Float[Array, "1 E"], tuple[View, ...]]:
    """Reads the first `count` tokens, of positions from `start` on, through a slot's views as decode steps do.

    Returns:
        The last token's hidden state, and the views with all of them.
    """
    decoder = part.merge(leaves)
    layers = tuple(zip(kinds, plans, layer_leaves, strict=True))
    slots = caches[0].used.shape[0]
    active = jnp.arange(slots) == slot

    def body(index: Int[Array, ""], carry: tuple[Array, tuple[View, ...]]) -> tuple[Array, tuple[View, ...]]:
        token, position = (jnp.broadcast_to(x, slots) for x in (tokens[index], start + index))
        x, caches = _through_layers(decoder, layers, carry[1], token, position, active)
        return x, caches

    x = jax.eval_shape(lambda token: decoder.embed(token), jnp.broadcast_to(tokens[0], slots))
    x, caches = jax.lax.fori_loop(0, count, body, (jnp.zeros(x.shape, x.dtype), caches))
    return jax.lax.dynamic_slice_in_dim(x, slot, 1), caches


def _step(
    decoder: Decoder,
    layers: tuple[_Layer, ...],
    caches: tuple[View, ...],
    state: DecodeState,
) -> tuple[Steps, tuple[View, ...], DecodeState]:
    x, caches = _through_layers(decoder, layers, caches, state.token, state.position, state.active)
    drawn, sampler = sample(decoder.head(x), state.sampler, state.generated, state.active)
    advance = state.active.astype(jnp.int32)
    generated = state.generated + advance
    ended = jnp.any(drawn.token[:, None] == sampler.stop_token_ids, axis=-1) | (generated >= state.limit)
    new = DecodeState(
        token=jnp.where(state.active, drawn.token, state.token),
        position=state.position + advance,
        generated=generated,
        limit=state.limit,
        active=state.active & ~ended,
        sampler=sampler,
    )
    return Steps(state.active, drawn), caches, new


def _through_layers(
    decoder: Decoder,
    layers: tuple[_Layer, ...],
    caches: tuple[View, ...],
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
) -> tuple[Float[Array, "B E"], tuple[View, ...]]:
    x, new = decoder.embed(token), []
    for (kind, plan, leaves), view in zip(layers, caches, strict=True):
        x, view = _decode_layer(kind, plan, leaves, view, x, position, active)
        new.append(view)
    return x, tuple(new)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode_layer(
    kind: LayerKind,
    plan: LayerCacheConfig,
    leaves: tuple[Array, ...],
    view: View,
    x: Float[Array, "B E"],
    position: Int[Array, "B"],
    active: Bool[Array, "B"],
) -> tuple[Float[Array, "B E"], View]:
    """One layer of a decode step. Jitted inside the step so that layers of a kind are traced once."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        nonlocal view
        view = views.append(plan, view, q, k, v, position, active)
        return views.attend(plan, view, q, position, active, window=kind.window, **kind.reading)

    x = kind.part.merge(leaves)(x, position, attend)
    return x, view


def _workspace_specs(workspace: Workspace) -> Workspace:
    kv_heads, tokens, head_dim = workspace.k.shape
    window, query_heads = (0, 0) if workspace.queries is None else workspace.queries.shape[:2]
    return Workspace.declare(
        kv_heads=kv_heads,
        tokens=tokens,
        head_dim=head_dim,
        dtype=workspace.k.dtype,
        window=window,
        query_heads=query_heads,
    )


def _view_specs(plan: LayerCacheConfig, view: View) -> View:
    slots, kv_heads, capacity, head_dim = view.k.shape
    window, query_heads = (0, 0) if view.queries is None else view.queries.shape[1:3]
    return View.declare(
        slots=slots,
        kv_heads=kv_heads,
        capacity=capacity,
        head_dim=head_dim,
        dtype=view.k.dtype,
        page_size=plan.page_size,
        bounds_dtype=None if view.bounds is None else view.bounds.dtype,
        window=window,
        query_heads=query_heads,
        chooses=plan.chooses,
    )
