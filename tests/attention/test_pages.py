"""Page summaries: the elementwise extremes of consecutive entries, and only the written page changes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.pages import summarize, update
from kvjax.cache import View, allocate
from tests.attention import rocketkv_oracle as oracle


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


run_summarize = jax.jit(summarize, static_argnames=("page_size", "dtype"))


@functools.partial(jax.jit, static_argnames=("page_size",), donate_argnums=0)
def run_update(bounds, k, filled, written, active, page_size):
    return update(bounds, k, jnp.where(filled, 0, -1), written, active, page_size)


def declare_bounds(capacity, page_size, head_dim):
    view = View.declare(
        slots=2, kv_heads=2, capacity=capacity, head_dim=head_dim, dtype=jnp.float32, page_size=page_size
    )
    return view.bounds


@pytest.mark.parametrize(("page_size", "capacity"), [(1, 5), (2, 9), (3, 10), (3, 12), (4, 16), (8, 16), (16, 40)])
def test_summaries_agree_with_numpy(page_size, capacity):
    k, held = normal(0, 2, 2, capacity, 8), capacity - 3
    filled = np.broadcast_to(np.arange(capacity) < held, k.shape[:3])
    k[~filled] = np.nan
    got = np.asarray(run_summarize(k, filled, page_size))
    assert got.shape == declare_bounds(capacity, page_size, head_dim=8).shape
    for slot, head in np.ndindex(2, 2):
        want = oracle.pages_of(k[slot, head, :held], page_size)
        np.testing.assert_array_equal(got[slot, head, : len(want)], [np.stack(pair) for pair in want])
        assert (got[slot, head, len(want) :] == 0).all()


def test_entries_without_a_position_do_not_count():
    k = normal(0, 1, 1, 8, 4)
    filled = np.array([1, 0, 1, 1, 0, 0, 0, 0], bool)[None, None]
    want = [[k[0, 0, [0, 2, 3]].max(0), k[0, 0, [0, 2, 3]].min(0)], np.zeros((2, 4))]
    k[~filled] = np.inf
    np.testing.assert_array_equal(run_summarize(k, filled, 4)[0, 0], want)


@hypothesis.given(
    shape=st.sampled_from([(1, 6), (3, 10), (4, 16)]),
    starts=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)),
    idle=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 2))),
    seed=st.integers(0, 1000),
)
def test_appending_equals_rebuilding(shape, starts, idle, seed):
    """Slots of unlike lengths, some of them idle in some steps, over a summary that another request left behind."""
    page_size, capacity = shape
    k, used = normal(seed, 3, 2, capacity, 4), np.array([min(s, capacity) for s in starts])

    def filled():
        return np.broadcast_to(np.arange(capacity) < used[:, None, None], k.shape[:3])

    bounds = np.asarray(run_summarize(k, filled(), page_size))
    bounds = np.where(bounds == 0, 99, bounds)  # what an earlier request has left in pages not yet begun
    for step in range(4):
        active = np.array([(step, slot) not in idle and used[slot] < capacity for slot in range(3)])
        before, written = bounds, used.copy()
        used = used + active
        k[np.arange(3)[active], :, written[active]] = normal(seed + step, int(active.sum()), 2, 4)
        args = (filled(), written.astype(np.int32), active, page_size)
        bounds = np.asarray(run_update(jnp.array(before), k, *args))
        changed = (bounds != before).any(axis=(1, 3, 4))  # [slot, page]
        for slot, page in np.argwhere(changed):
            assert active[slot]
            assert page == written[slot] // page_size
    begun = np.arange(bounds.shape[2]) < -(-used[:, None] // page_size)
    rebuilt = np.asarray(run_summarize(k, filled(), page_size))
    np.testing.assert_array_equal(bounds.swapaxes(1, 2)[begun], rebuilt.swapaxes(1, 2)[begun])


def test_a_summary_narrower_than_the_keys():
    k, filled = normal(0, 1, 1, 8, 4), np.ones((1, 1, 8), bool)
    got = run_summarize(k, filled, 4, jnp.bfloat16)
    np.testing.assert_array_equal(got, run_summarize(k, filled, 4).astype(jnp.bfloat16))
    one = np.zeros(1, np.int32)
    again = run_update(jnp.zeros_like(got), k, filled, one, one == 0, 4)
    assert again.dtype == jnp.bfloat16
    np.testing.assert_array_equal(again[:, :, 0], got[:, :, 0])


def test_a_donated_summary_is_updated_in_place():
    spec = declare_bounds(4096, 4, head_dim=64)
    bounds = allocate(spec)
    assert bounds.nbytes == spec.nbytes == 2 * 2 * 1024 * 2 * 64 * 4
    k, filled = jnp.zeros((2, 2, 4096, 64)), jnp.zeros((2, 2, 4096), bool)
    number = jnp.zeros(2, jnp.int32)
    compiled = run_update.lower(bounds, k, filled, number, number == 0, page_size=4).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= spec.nbytes
    assert memory.temp_size_in_bytes < spec.nbytes / 10
