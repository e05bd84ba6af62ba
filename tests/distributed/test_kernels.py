"""Kernels over several devices: each reads the views of its own kv heads, and together they say what one would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.attention import views
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.pages import summarize
from kvjax.attention.selection import HybridPages
from kvjax.cache import TENSOR, SlotLimits, View, constrain
from kvjax.pallas.ops import kernel_ops
from tests.pallas.cases import Case

CASE = Case(2, 128, 8, 64, (40, 0, 64), kv_heads=2, dtype="float32")
PLANS = {
    "full": LayerCacheConfig(64),
    "selected": LayerCacheConfig(64, selection=HybridPages(16, 8, dense_threshold=8)),
}


def arguments(plan: LayerCacheConfig) -> tuple:
    held = np.array(CASE.entries)
    positions = np.broadcast_to(np.arange(CASE.capacity), (3, 2, CASE.capacity))
    positions = np.where(positions < held[:, None, None], positions, -1).astype(np.int32)
    k, v = CASE.array(CASE.keys), CASE.array(CASE.values)
    bounds = limits = None
    if plan.selection is not None:
        bounds = summarize(k, jnp.asarray(positions >= 0), 8, jnp.bfloat16)
        limits = SlotLimits(*(jnp.full(3, number) for number in (64, 16, 8, 0)))
    queries = jnp.zeros((3, 4, 4, CASE.dim))  # which nobody reads here, and which are split in another way
    view = View(k, v, jnp.asarray(positions), CASE.held, bounds, queries, limits)
    return view, CASE.array(CASE.q.reshape(3, -1, CASE.dim)), jnp.max(view.positions, axis=(1, 2)), CASE.held > 0


def specs(plan: LayerCacheConfig) -> View:
    return View.declare(
        slots=3,
        kv_heads=2,
        capacity=CASE.capacity,
        head_dim=CASE.dim,
        dtype=jnp.float32,
        page_size=plan.page_size,
        bounds_dtype=jnp.bfloat16,
        window=4,
        query_heads=4,
        chooses=plan.chooses,
    )


@pytest.mark.slow  # two devices share an interpreter
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_devices_read_their_own_heads(devices, plan):
    mesh = Mesh(np.array(devices[:2]), (TENSOR,))
    view, q, position, active = arguments(plan)
    options = {"scale": CASE.scale, "window": None}
    want = views.attend(plan, view, q, position, active, **options)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):

        @jax.jit
        def read(view, q, position, active):
            view = constrain(view, specs(plan), mesh)
            return views.attend(plan, view, q, position, active, ops=kernel_ops("tpu", mesh), **options)

        got = read(view, q, position, active)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, TENSOR)), got.ndim)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_nothing_passes_between_devices_while_they_read(devices, plan):
    mesh = Mesh(np.array(devices[:2]), (TENSOR,))
    shape = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=spec.sharding(mesh)),
        specs(plan),
        is_leaf=lambda leaf: dataclasses.is_dataclass(leaf) and hasattr(leaf, "sharding"),
    )
    _, q, position, active = arguments(plan)
    q = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh, PartitionSpec(None, TENSOR)))

    def read(view, q, position, active):
        # by the reference's operations: how they are split is what is looked at, and a CPU compiles no kernels
        ops = kernel_ops("reference", mesh)
        return views.attend(plan, view, q, position, active, scale=1.0, window=None, ops=ops)

    text = jax.jit(read).lower(shape, q, position, active).compile().as_text()
    assert not [name for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if name in text]
