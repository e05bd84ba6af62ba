"""Operation tables: a decode step reads the same by each backend's, and is composed of the operations of its table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import views
from kvjax.attention.eviction import Observation, PromptState
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.ops import REFERENCE_OPS, Ops, PageView
from kvjax.attention.pages import summarize
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection
from kvjax.cache import SlotLimits, View
from kvjax.pallas.ops import backend_ops
from tests.pallas.cases import Case
from tests.pallas.interpreter import interpreted, run

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
    return views.attend(plan, *arrays, scale=CASE.scale, window=None, ops=backend_ops(implementation))


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
        (LayerCacheConfig(512, selection=HybridTokens(64, 16, 8)), None, "16 head dims"),
        (LayerCacheConfig(512, selection=ExactTopK(64)), None, "exact scores"),
        (LayerCacheConfig(512, head_max_retained=(100, 200)), None, "have gaps"),
        (LayerCacheConfig(512, selection=HybridPages(64, 8), head_max_retained=(100, 200)), None, "have gaps"),
    ],
)
def test_a_layer_without_kernels_is_refused_by_name_and_falls_to_the_reference_otherwise(plan, window, reason):
    view, *others = arguments(PLANS["selected"])
    view, options = View(view.k, view.v, view.positions, view.used, view.bounds), {"scale": 0.1, "window": window}
    with pytest.raises(NotImplementedError, match=reason):
        views.attend(plan, view, *others, ops=backend_ops("gpu"), **options)
    np.testing.assert_array_equal(
        views.attend(plan, view, *others, ops=backend_ops(None), **options),
        views.attend(plan, view, *others, ops=backend_ops("reference"), **options),
    )


def test_an_operation_that_raises_falls_to_the_references_alone(monkeypatch, caplog):
    """On a TPU: Quest scores by jax.numpy, and the pages that it chooses are chosen and read by kernels."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    plan = LayerCacheConfig(512, selection=QuestSelection(64, page_size=8))
    view, q, position, active = arguments(PLANS["selected"])
    options = {"scale": CASE.scale, "window": None}
    with caplog.at_level("DEBUG"), interpreted("tpu"):
        got = views.attend(plan, view, q, position, active, ops=backend_ops(None), **options)
    assert [record.getMessage().split()[0] for record in caplog.records if "runs as" in record.getMessage()] == [
        "quest_scores"
    ]
    want = views.attend(plan, view, q, position, active, **options)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_layer_is_composed_of_the_operations_of_its_table(plan):
    """Another backend is a table; here of operations that count their calls, one of them written anew."""
    calls: list[str] = []

    def counted(name: str):
        def operation(*arrays, **options):
            calls.append(name)
            return getattr(REFERENCE_OPS, name)(*arrays, **options)

        return operation

    def page_scores(pages: PageView, *, page_size: int):
        """The softmax over all entries that are filled, whose pages have a logit each."""
        calls.append("page_scores")
        high, low = (pages.summary[:, :, None, :, side].astype(jnp.float32) for side in (0, 1))
        q = pages.q[:, :, :, None].astype(jnp.float32)
        logits = jnp.sum(jnp.maximum(q * high, q * low), axis=-1) * pages.scale
        filled = pages.filled.reshape(*pages.filled.shape[:2], -1, page_size).sum(axis=-1)[:, :, None]
        weights = jnp.where(filled > 0, jnp.exp(logits), 0)
        return jnp.mean(weights / jnp.maximum(jnp.sum(weights * filled, axis=-1, keepdims=True), 1e-30), axis=2)

    ops = Ops(**{field.name: counted(field.name) for field in dataclasses.fields(Ops)})
    ops = dataclasses.replace(ops, page_scores=page_scores)
    view, q, position, active = arguments(plan)
    options = {"scale": CASE.scale, "window": None}
    got = views.attend(plan, view, q, position, active, ops=ops, **options)
    np.testing.assert_array_equal(got, views.attend(plan, view, q, position, active, **options))
    sparse = ["page_scores", "page_selection", "selected_attention", "decode_attention"]
    assert calls == (["decode_attention"] if plan.selection is None else sparse)


def test_an_eviction_rule_runs_the_operation_of_the_table_that_a_prompt_is_handed():
    def received(queries, k, length, observed, *, scale, per_head):
        return jnp.broadcast_to(-jnp.arange(float(k.shape[1])), (k.shape[0], k.shape[1]))

    k = jnp.zeros((2, 64, 16))
    ops = dataclasses.replace(REFERENCE_OPS, attention_received=received)
    state = PromptState(jnp.zeros((4, 4, 16)), k, k, jnp.int32(50), scale=1.0, ops=ops)
    positions = Observation(4, kernel=1).select(state, max_retained=10, capacity=12)
    assert positions.tolist() == [[*range(6), *range(46, 50), -1, -1]] * 2
