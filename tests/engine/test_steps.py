"""Views as rings, and what the compiled steps do to memory."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax import cache, models
from kvjax.attention import decode_attention, views
from kvjax.attention.methods import LayerCacheConfig
from kvjax.cache import View, Workspace
from kvjax.engine.device import steps
from kvjax.engine.device.split_model import SplitModel
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig
from tests.attention import oracle

KV_HEADS, DIM, SLOTS = 2, 4, 3


def filled_view(capacity: int, seed: int = 0) -> View:
    """A view in which earlier requests have left something everywhere."""
    random = np.random.default_rng(seed)
    shape = (SLOTS, KV_HEADS, capacity, DIM)
    k, v = (jnp.asarray(random.normal(0, 9, shape), jnp.float32) for _ in range(2))
    positions = jnp.asarray(random.integers(0, 50, shape[:3]), jnp.int32)
    return View(k, v, positions, jnp.asarray(random.integers(1, 50, SLOTS), jnp.int32))


def arrays(view: View) -> list[np.ndarray]:
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(view)]


PLAN = LayerCacheConfig(1)  # of a layer where nothing is chosen; its capacity is the view's


@functools.partial(jax.jit, donate_argnums=0)
def install(view, workspace, slot, length):
    return views.write_slot(PLAN, view, workspace, slot, length, PLAN.limits(), scale=1.0)


@jax.jit
def append(view, k, v, position, active):
    return views.append(PLAN, view, k, k, v, position, active)


@functools.partial(jax.jit, static_argnames="window")
def attend(q, view, asking, active, window):
    entries = jnp.where(active, jnp.minimum(view.used, view.k.shape[2]), 0)
    return decode_attention(q, view.k, view.v, view.positions, asking, entries, scale=0.7, window=window)


@pytest.mark.parametrize("headroom", [64, 20])
@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 13, 14, 15, 20])
def test_a_ring_holds_the_last_tokens(length, headroom):
    """A prompt is installed, then tokens are added until the ring has turned several times."""
    window, slot = 7, 1
    random = np.random.default_rng(length)
    total = length + 3 * window + 2
    k, v = random.normal(0, 1, (2, KV_HEADS, total, DIM)).astype(np.float32)
    workspace = Workspace(
        *(jnp.asarray(np.pad(x[:, :length], ((0, 0), (0, headroom - length), (0, 0)))) for x in (k, v))
    )
    view = filled_view(window)
    before = arrays(view)
    view = install(view, workspace, np.int32(slot), np.int32(length))
    active = np.arange(SLOTS) == slot
    for position in range(length, total):
        assert int(view.used[slot]) == position
        last = np.arange(max(0, position - window), position)
        held = np.asarray(view.positions[slot])
        for head in range(KV_HEADS):
            assert sorted(held[head][held[head] >= 0]) == last.tolist()
            for place, token in enumerate(held[head]):
                if token >= 0:
                    np.testing.assert_array_equal(view.k[slot, head, place], k[head, token])
                    np.testing.assert_array_equal(view.v[slot, head, place], v[head, token])
        now = [np.broadcast_to(x[:, position], (SLOTS, KV_HEADS, DIM)) for x in (k, v)]
        view = append(view, *now, np.full(SLOTS, position, np.int32), active)
    for old, new in zip(before, arrays(view), strict=True):
        np.testing.assert_array_equal(old[~active], new[~active])


@pytest.mark.parametrize(("capacity", "window"), [(7, 7), (40, 7), (40, None), (64, None)])
def test_what_a_view_holds_is_what_dense_attention_sees(capacity, window):
    length, total, headroom = 11, 40, 48
    random = np.random.default_rng(1)
    k, v = random.normal(0, 1, (2, KV_HEADS, total, DIM)).astype(np.float32)
    workspace = Workspace(*(jnp.asarray(np.pad(x, ((0, 0), (0, headroom - total), (0, 0)))) for x in (k, v)))
    view = install(filled_view(capacity), workspace, np.int32(0), np.int32(length))
    active = np.array([True, False, False])
    for position in range(length, total):
        now = [np.broadcast_to(x[:, position], (SLOTS, KV_HEADS, DIM)) for x in (k, v)]
        asking = np.full(SLOTS, position, np.int32)
        view = append(view, *now, asking, active)
        q = random.normal(0, 1, (SLOTS, 2 * KV_HEADS, DIM)).astype(np.float32)
        got = attend(q, view, asking, active, window)
        want = oracle.prefill(q[:1], k, v, position, 0.7, window)
        np.testing.assert_allclose(got[:1], want, atol=1e-5)


@pytest.mark.parametrize(("capacity", "rows"), [(7, KV_HEADS), (40, KV_HEADS), (40, 3 * KV_HEADS)])
def test_appended_tokens_are_taken_from_a_view_as_they_are_and_others_are_not_proven(capacity, rows):
    """A ring that has turned, and views of a choice, some of them with rows for each query head."""
    slot, length, total, start, count = 1, 6, 21, 12, 12
    random = np.random.default_rng(capacity + rows)
    shape = (SLOTS, rows, capacity, DIM)
    view = View(jnp.zeros(shape), jnp.zeros(shape), jnp.full(shape[:3], -1), jnp.zeros(SLOTS, jnp.int32))
    retained = (
        random.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)[:, :4] if capacity == 40 else np.zeros((rows, 0))
    )
    retained = np.sort(retained, axis=1).astype(np.int32)  # each row has chosen for itself
    entries = retained.shape[1]
    view = View(view.k, view.v, view.positions.at[slot, :, :entries].set(retained), view.used.at[slot].set(entries))
    k, v = random.normal(0, 1, (2, total, SLOTS, KV_HEADS, DIM)).astype(np.float32)
    active = np.arange(SLOTS) == slot
    for position in range(length, total):
        view = append(view, k[position], v[position], np.full(SLOTS, position, np.int32), active)
    take = functools.partial(views.entries, count=count, kv_heads=KV_HEADS)
    keys, values, held = jax.jit(take)(view, np.int32(slot), np.int32(start))
    first = max(total - capacity, length)
    assert held.tolist() == [first <= position < total for position in range(start, start + count)]
    for index, position in enumerate(range(start, start + count)):
        if held[index]:
            np.testing.assert_array_equal(keys[index], k[position, slot])
            np.testing.assert_array_equal(values[index], v[position, slot])
    _, _, early = jax.jit(take)(view, np.int32(slot), np.int32(0))
    assert not early[:length].any(), "of the prompt a view holds what it has chosen, each row something else"


def test_idle_slots_keep_every_bit():
    """One of them may be receiving a prompt: not even a NaN may be changed there."""
    view = filled_view(5)
    view = View(view.k.at[2].set(jnp.nan), view.v.at[2].set(-0.0), view.positions, view.used)
    before = arrays(view)
    ones = np.ones((SLOTS, KV_HEADS, DIM), np.float32)
    for active in ([False] * 3, [False, True, False]):
        after = arrays(append(view, ones, ones, np.full(SLOTS, 9, np.int32), np.array(active)))
        for old, new in zip(before, after, strict=True):
            assert old[~np.array(active)].tobytes() == new[~np.array(active)].tobytes()


def test_installing_leaves_other_slots_alone():
    view = filled_view(12)
    before = arrays(view)
    workspace = cache.allocate(Workspace.declare(kv_heads=KV_HEADS, tokens=8, head_dim=DIM, dtype=jnp.float32))
    after = arrays(install(view, workspace, np.int32(1), np.int32(5)))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old[[0, 2]], new[[0, 2]])
    assert after[2][1].tolist() == [[0, 1, 2, 3, 4] + [-1] * 7] * KV_HEADS
    assert after[3].tolist() == [before[3][0], 5, before[3][2]]


# A medium model, only compiled: sizes at which a copy of a cache is far larger than anything else.
CONTEXT, CHUNK = 65536, 256
ROPE = RopeConfig(64, 1e4)
MEDIUM = DecoderConfig(
    family="qwen2",
    vocab_size=1000,
    width=256,
    mlp_width=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    layers=(LayerConfig(ROPE), LayerConfig(ROPE, 1024)),
    query_scale=0.125,
    norm_eps=1e-6,
    max_position=CONTEXT,
)


def shapes(specs):
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs, is_leaf=cache._is_spec)


def abstract_model() -> SplitModel:
    """The medium model, taken apart; all leaves are shapes."""
    return SplitModel.of(models.abstract(MEDIUM))


def sizes(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a compiled program."""
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


def check_no_copies(compiled, donated: int):
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= donated
    assert memory.temp_size_in_bytes < 0.05 * donated, f"{memory.temp_size_in_bytes:,} of {donated:,} bytes"
    squares = [shape for shape in sizes(compiled.as_text()) if sum(size >= CONTEXT for size in shape) > 1]
    assert not squares, "arrays of T x T"


def test_decode_copies_no_cache():
    slots = 4
    model = abstract_model()
    specs = tuple(
        View.declare(slots=slots, kv_heads=2, capacity=layer.window or CONTEXT, head_dim=64, dtype=jnp.float32)
        for layer in MEDIUM.layers
    )
    state = shapes(steps.DecodeState.declare(slots, MEDIUM.vocab_size))
    alive, count = jax.ShapeDtypeStruct((slots,), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)
    plans = (PLAN,) * len(model.kinds)
    lowered = steps.decode.lower(
        model.trunk, model.kinds, plans, 4, model.trunk_leaves, model.layer_leaves, shapes(specs), state, alive, count
    )
    check_no_copies(lowered.compile(), cache.nbytes(specs))


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "window"])
def test_prefill_copies_no_cache_and_never_multiplies_the_context_with_itself(layer):
    model = abstract_model()
    workspace = Workspace.declare(kv_heads=2, tokens=CONTEXT, head_dim=64, dtype=jnp.float32)
    hidden = jax.ShapeDtypeStruct((CONTEXT, MEDIUM.width), jnp.float32)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = steps.prefill_layer.lower(
        model.kinds[layer], CHUNK, model.layer_leaves[layer], hidden, shapes(workspace), start, start
    )
    check_no_copies(lowered.compile(), cache.nbytes(workspace) + 4 * hidden.size)


@pytest.mark.parametrize("window", [None, 1024])
def test_install_copies_no_view(window):
    view = View.declare(slots=4, kv_heads=2, capacity=window or CONTEXT, head_dim=64, dtype=jnp.float32)
    workspace = Workspace.declare(kv_heads=2, tokens=512, head_dim=64, dtype=jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = install.lower(shapes(view), shapes(workspace), number, number).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.nbytes(view)
    assert memory.temp_size_in_bytes < 0.7 * cache.nbytes(workspace)


def test_taking_tokens_from_views_copies_none_of_them():
    specs = tuple(
        View.declare(slots=4, kv_heads=2, capacity=capacity, head_dim=64, dtype=jnp.float32)
        for capacity in (CONTEXT, 1024)
    )
    number = jax.ShapeDtypeStruct((), jnp.int32)
    memory = steps.gather_tokens.lower(CHUNK, 2, shapes(specs), number, number).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * cache.nbytes(specs)


def test_layers_of_a_kind_are_one_object_and_the_decoder_keeps_its_layers():
    config = dataclasses.replace(MEDIUM, layers=(*MEDIUM.layers, *MEDIUM.layers), max_position=CONTEXT)
    decoder = models.abstract(config)
    model = SplitModel.of(decoder, backend="tpu")
    assert len(decoder.layers) == 4
    assert [kind is model.kinds[0] for kind in model.kinds] == [True, False, True, False]
    assert [kind.window for kind in model.kinds] == [None, 1024] * 2
    assert {kind.attention_backend for kind in model.kinds} == {"tpu"}
    assert len({len(leaves) for leaves in model.layer_leaves}) == 1
    assert len(model.trunk_leaves) + sum(map(len, model.layer_leaves)) == len(jax.tree.leaves(nnx.state(decoder)))
    bare = model.without_leaves()
    assert (bare.trunk, bare.kinds) == (model.trunk, model.kinds)
    assert not bare.trunk_leaves + bare.layer_leaves
