"""Read units of a view, and attention over them alone: the contracts that all methods of stage 2 share."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.read_units import ReadUnits, attend_selected, choose, filled_entries
from tests.attention import rocketkv_oracle as oracle
from tests.attention.views import HEADS, normal

SEEDS = st.integers(0, 10_000)
CAPACITY, DIM, UNITS = 24, 8, 4


def test_filled_entries_are_leading_and_have_a_position():
    positions = np.array([[[0, 1, -1, 9, 10, -1]], [[3, 4, 5, 6, 7, 8]], [[0, 1, 2, 3, 4, 5]]])
    got = filled_entries(jnp.asarray(positions), jnp.array([4, 6, 0]))
    np.testing.assert_array_equal(got, np.array([[[1, 1, 0, 1, 0, 0]], [[1] * 6], [[0] * 6]], bool))


# Choosing


@functools.partial(jax.jit, static_argnames="count")
def run_choose(scores, eligible, count):
    return choose(scores, eligible, count)


def chosen_units(selection: ReadUnits, slot: int, row: int) -> list[int]:
    return np.asarray(selection.units)[slot, row][np.asarray(selection.chosen)[slot, row]].tolist()


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    count=st.sampled_from([1, 3, 12, 15]),
    values=st.sampled_from([1, 4, 1000]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=SEEDS,
)
def test_the_best_eligible_units_are_chosen_in_order(count, values, share, seed):
    """Few values make many equals, of which the earlier come first. What is not eligible may be NaN or infinite."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, values, (2, 3, 12)).astype(np.float32)
    scores *= random.choice([1, -1], scores.shape)  # 0 and -0 are equals too
    eligible = random.random(scores.shape) < share
    scores[~eligible] = random.choice([np.nan, np.inf, -np.inf], scores.shape)[~eligible]
    selection = run_choose(scores, eligible, count)
    assert selection.units.shape == selection.chosen.shape == (2, 3, min(count, 12))
    for slot, row in np.ndindex(2, 3):
        known = np.flatnonzero(eligible[slot, row])
        order = [int(known[i]) for i in oracle.stable_top(scores[slot, row, known], len(known))]
        assert chosen_units(selection, slot, row) == order[:count]


def test_infinite_scores_are_chosen_first_and_minus_infinite_ones_never():
    scores = jnp.array([[[0.0, jnp.inf, 5, -jnp.inf, jnp.inf]]])
    selection = run_choose(scores, jnp.ones((1, 1, 5), bool), 5)
    assert chosen_units(selection, 0, 0) == [1, 4, 2, 0]


# Attending


@functools.partial(jax.jit, static_argnames="page_size")
def run_attend(q, k, v, filled, selection, page_size, scale=DIM**-0.5):
    return attend_selected(q, k, v, filled, selection, page_size=page_size, scale=scale)


def draw(heads: str, rows: str, page_size: int, share: float, seed: int, slots: int = 2):
    """Views with holes, NaN there, and for each row a few units, some of which do not count."""
    count, kv_heads = HEADS[heads]
    q = normal(seed, slots, kv_heads, count // kv_heads, DIM)
    k, v = (normal(seed + i, slots, kv_heads, CAPACITY, DIM) for i in (1, 2))
    random = np.random.default_rng(seed)
    filled = random.random(k.shape[:3]) < share
    k[~filled] = v[~filled] = np.nan
    shape = (slots, count if rows == "query heads" else kv_heads, UNITS)
    units = np.argsort(random.random((*shape[:2], CAPACITY // page_size)))[..., :UNITS].astype(np.int32)
    return q, k, v, filled, ReadUnits(units, random.random(shape) < 0.7)


def expected(q, k, v, filled, selection, page_size, scale=DIM**-0.5):
    """From the oracle, one query head at a time; zeros where nothing is read."""
    slots, kv_heads, group, _ = q.shape
    rows, out = selection.units.shape[1], np.zeros_like(q)
    for slot, head, g in np.ndindex(slots, kv_heads, group):
        row = head * group + g if rows == kv_heads * group else head
        units = selection.units[slot, row][selection.chosen[slot, row]]
        read = [int(entry) for entry in np.flatnonzero(filled[slot, head]) if entry // page_size in units]
        if read:
            out[slot, head, g] = oracle.attend(q[slot, head, g : g + 1], k[slot, head], v[slot, head], read, scale)[0]
    return out


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    case=st.sampled_from(
        [("mha", "kv heads", 1), ("mqa", "kv heads", 4), ("gqa3", "kv heads", 3), ("gqa3", "query heads", 4)]
    ),
    share=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=SEEDS,
)
def test_only_filled_entries_of_chosen_units_are_read(case, share, seed):
    heads, rows, page_size = case
    arguments = draw(heads, rows, page_size, share, seed)
    out = run_attend(*arguments, page_size)
    np.testing.assert_allclose(out, expected(*arguments, page_size), rtol=5e-4, atol=1e-5)


@hypothesis.settings(max_examples=15)
@hypothesis.given(seed=SEEDS)
def test_neither_the_order_of_units_nor_those_that_do_not_count_matter(seed):
    q, k, v, filled, selection = draw("gqa3", "query heads", 4, 0.6, seed)
    out = run_attend(q, k, v, filled, selection, 4)
    order = np.argsort(np.random.default_rng(seed + 1).random(selection.units.shape))
    units, chosen = (np.take_along_axis(x, order, axis=2) for x in (selection.units, selection.chosen))
    units = np.where(chosen, units, 0)
    again = run_attend(q, k, v, filled, ReadUnits(units, chosen), 4)
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)


def test_large_logits_neither_overflow_nor_blur():
    q, k, v, filled, selection = draw("gqa3", "kv heads", 3, 1.0, 0)
    out = run_attend(1e4 * q, k, v, filled, selection, 3)
    np.testing.assert_allclose(out, expected(1e4 * q, k, v, filled, selection, 3), rtol=5e-4, atol=1e-5)


def test_half_precision_comes_out_as_it_went_in_and_is_summed_in_single():
    q, k, v, filled, selection = draw("gqa3", "kv heads", 3, 0.6, 1)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = run_attend(*halves, filled, selection, 3)
    assert out.dtype == jnp.bfloat16
    want = expected(*(np.asarray(x, np.float32) for x in halves), filled, selection, 3)
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=2e-2)


@pytest.mark.parametrize("page_size", [5, 16])
def test_a_view_of_broken_pages_is_refused(page_size):
    q, k, v, filled, selection = draw("mha", "kv heads", 1, 1.0, 0)
    with pytest.raises(ValueError, match=f"capacity=24 is not a multiple of page_size={page_size}: round"):
        run_attend(q, k, v, filled, selection, page_size)
