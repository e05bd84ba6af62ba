"""A layer's prefill with kernels: a view keeps what it keeps without, and a chunk leaves what it leaves without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import cache
from kvjax.attention import views
from kvjax.attention.eviction import Observation, Streaming
from kvjax.attention.methods import LayerCacheConfig
from kvjax.cache import SlotLimits, View, Workspace
from kvjax.pallas.ops import backend_ops
from tests.pallas.cases import Case
from tests.pallas.interpreter import run

LENGTH, TOKENS, WINDOW = 200, 256, 8
CASE = Case(4, 128, 8, TOKENS, (LENGTH,), kv_heads=2)
PLANS = {
    "observed": LayerCacheConfig(64, Observation(WINDOW, kernel=7), max_retained=48),
    "per head": LayerCacheConfig(64, Observation(WINDOW, kernel=7, per_head=True), max_retained=48),
    "streaming": LayerCacheConfig(64, Streaming(WINDOW), max_retained=48),
    "full": LayerCacheConfig(TOKENS),
}


def workspace(dtype: str | None = None) -> Workspace:
    queries = CASE.array(CASE.draw(3, WINDOW, 8, CASE.dim), dtype)
    return Workspace(CASE.array(CASE.keys[0], dtype), CASE.array(CASE.values[0], dtype), queries)


def installed(plan: LayerCacheConfig, *, implementation: str | None, dtype: str | None = None) -> View:
    """What is in the first of two slots after `LENGTH` tokens."""
    chooses = plan.eviction is not None
    view = cache.allocate(
        View.declare(
            slots=2,
            kv_heads=plan.heads(2, 8),
            capacity=plan.capacity,
            head_dim=CASE.dim,
            dtype=CASE.dtype,
            chooses=chooses,
        )
    )
    limits = SlotLimits(*(jnp.int32(number) for number in (plan.max_retained, 64, 0, 0)))
    options = {"scale": CASE.scale, "ops": backend_ops(implementation)}
    new = views.write_slot(plan, view, workspace(dtype), jnp.int32(0), jnp.int32(LENGTH), limits, **options)
    return jax.tree.map(lambda leaf: leaf[0], new)


def same(plan: LayerCacheConfig, implementation: str) -> None:
    def retained(*, implementation):
        view = installed(plan, implementation=implementation)
        return jnp.concatenate([view.positions[..., None].astype(jnp.float32), view.k, view.v], axis=-1)

    want, got = run("reference", retained), run(implementation, retained)
    assert (want[..., 0] >= 0).sum() == plan.retained(LENGTH) * len(want)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("plan", [PLANS["observed"], pytest.param(PLANS["per head"], marks=pytest.mark.slow)])
def test_a_view_keeps_what_the_reference_keeps(plan):
    same(plan, "tpu")


@pytest.mark.slow  # two kernels in an interpreter
@pytest.mark.parametrize("name", ["observed", "per head"])
def test_a_view_keeps_what_the_reference_keeps_on_a_gpu(name):
    same(PLANS[name], "gpu")


def test_a_name_that_does_not_serve_is_refused_where_the_layer_looks_at_queries():
    with pytest.raises(NotImplementedError, match="queries of float32"):
        installed(PLANS["observed"], implementation="gpu", dtype="float32")


@pytest.mark.parametrize("name", ["streaming", "full"])
def test_a_layer_that_looks_at_no_query_is_installed_by_any_name(name):
    by_name, reference = (installed(PLANS[name], implementation=each) for each in ("gpu", "reference"))
    jax.tree.map(np.testing.assert_array_equal, by_name, reference)


def test_a_chunk_is_attended_by_the_name_that_is_asked_for():
    whole = dataclasses.replace(CASE, entries=(TOKENS,))
    k, v = (whole.array(x[0]) for x in (whole.keys, whole.values))
    q = whole.array(whole.draw(4, 64, 8, whole.dim))

    def attend(*arrays, implementation):
        return backend_ops(implementation).prefill_attention(*arrays, scale=0.1, window=None)

    arguments = q, k, v, jnp.int32(TOKENS - 64)
    np.testing.assert_allclose(
        run("tpu", attend, *arguments), run("reference", attend, *arguments), rtol=2**-6, atol=2**-7
    )
    with pytest.raises(NotImplementedError, match="a chunk of 64 queries"):
        attend(*arguments, implementation="gpu")
