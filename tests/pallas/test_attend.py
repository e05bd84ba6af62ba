"""A layer's decode step with kernels reads what it reads without: over a full view, and by stage 2."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.pages import summarize
from kvjax.attention.selection import HybridPages
from kvjax.cache import SlotLimits, View
from kvjax.pallas.attend import attend
from tests.pallas.cases import Case
from tests.pallas.interpreter import run

CASE = Case(4, 128, 8, 512, (300, 0, 40, 511))
PLANS = {
    "full": LayerCacheConfig(512),
    "selected": LayerCacheConfig(512, selection=HybridPages(64, 8, dense_threshold=40)),
}


def arguments(plan: LayerCacheConfig):
    """A view in which the slots that are not decoding hold something too, and terms below those of the plan."""
    places = np.arange(CASE.capacity)
    held = np.array(CASE.entries)
    positions = np.where(places < held[:, None], 3 * places, -1)[:, None].astype(np.int32)
    k, v = CASE.array(CASE.keys), CASE.array(CASE.values)
    bounds = limits = None
    if plan.selection is not None:
        bounds = summarize(k, jnp.asarray(positions >= 0), 8, jnp.float8_e4m3fn)
        number = jnp.asarray([64, 64, 64, 32])
        limits = SlotLimits(number, number, jnp.asarray([40, 40, 40, 0]), jnp.zeros(4, jnp.int32))
    view = View(k, v, jnp.asarray(positions), CASE.held, bounds, None, limits)
    q = CASE.array(CASE.q.reshape(4, -1, CASE.dim))
    return view, q, jnp.max(view.positions, axis=(1, 2)), CASE.held > 0


def read(plan, *arrays, implementation):
    return attend(plan, *arrays, scale=CASE.scale, window=None, implementation=implementation)


@pytest.mark.slow  # several kernels in an interpreter
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_kernels_read_what_the_reference_reads(plan, implementation):
    def operation(*arrays, implementation):
        return read(plan, *arrays, implementation=implementation)

    arrays = arguments(plan)
    want = run("reference", operation, *arrays)
    assert np.isfinite(want).all()
    got = run(implementation, operation, *arrays)
    np.testing.assert_allclose(got, want, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize(
    ("plan", "window", "reason"),
    [
        (LayerCacheConfig(512), 100, "sliding window of 100"),
        (LayerCacheConfig(512, selection=QuestSelection(64, page_size=8)), None, "Quest"),
        (LayerCacheConfig(512, head_max_retained=(100, 200)), None, "have gaps"),
    ],
)
def test_a_layer_without_kernels_is_refused_by_name_and_falls_to_the_reference_otherwise(plan, window, reason):
    view, *others = arguments(PLANS["selected"])
    view, options = View(view.k, view.v, view.positions, view.used, view.bounds), {"scale": 0.1, "window": window}
    with pytest.raises(NotImplementedError, match=reason):
        attend(plan, view, *others, implementation="gpu", **options)
    np.testing.assert_array_equal(
        attend(plan, view, *others, implementation=None, **options),
        attend(plan, view, *others, implementation="reference", **options),
    )
