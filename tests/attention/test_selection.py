"""Stage 2 as a whole: decoding with each method from the first token to a full view, and the identities of its spec."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import decode, decode_attention
from kvjax.attention.pages import summarize, update
from kvjax.attention.read_units import filled_entries
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection, Selection
from tests.attention import rocketkv_oracle as oracle
from tests.attention.views import HEADS, Views, check_step, integers, normal, page_view, read_of, rows_of

STEPS = 48  # as many as a view has room for


def in_numpy(compiled):
    """Returns NumPy arrays: each index into one of JAX would be compiled."""
    return functools.wraps(compiled)(lambda *arguments: jax.device_get(compiled(*arguments)))


@in_numpy
@functools.partial(jax.jit, static_argnames="method")
def run(method: Selection, q, k, v, positions, entries):
    """Scores, selection and output of one step, over summaries made at once."""
    bounds = summarize(k, filled_entries(positions, entries), method.summary) if method.summary else None
    pages = page_view(q, k, v, positions, entries, bounds)
    return method.score(pages), method.select(pages), decode.attend(pages, method).reshape(q.shape)


@in_numpy
@functools.partial(jax.jit, static_argnames="method")
def decode_steps(method: Selection, q, k, v, active):
    """Steps [N, ...] in which active slots append a token and all slots attend.

    The views are NaN before, and so are their summaries, which only ever change where a token was appended.
    """
    _, slots, kv_heads, dim = k.shape
    empty = jnp.full((slots, kv_heads, STEPS, dim), jnp.nan)
    bounds = None
    if method.summary:
        bounds = jnp.full((slots, kv_heads, -(-STEPS // method.summary), 2, dim), jnp.nan)

    def step(carry, new):
        keys, values, positions, used, bounds = carry
        q, k, v, active = new
        at = (jnp.arange(slots), slice(None), jnp.where(active, used, STEPS))
        keys, values = keys.at[at].set(k, mode="drop"), values.at[at].set(v, mode="drop")
        positions = positions.at[at].set(used[:, None], mode="drop")
        written, used = used, used + active
        if bounds is not None:
            bounds = update(bounds, keys, positions, written, active, method.summary)
        pages = page_view(q, keys, values, positions, used, bounds)
        out = decode.attend(pages, method).reshape(q.shape)
        return (keys, values, positions, used, bounds), (method.score(pages), method.select(pages), out)

    first = (empty, empty, jnp.full(empty.shape[:3], -1), jnp.zeros(slots, jnp.int32), bounds)
    return jax.lax.scan(step, first, (q, k, v, active))


def methods(dim: int) -> list[Selection]:
    return [
        HybridTokens(12, dim // 2 + 3, 1, dense_threshold=13),
        HybridTokens(12, dim // 2, 2),
        HybridTokens(12, dim - 7, 3, dense_threshold=24),
        HybridPages(13, 4, dense_threshold=14),
        HybridPages(24, 8),
        HybridPages(32, 16),
        QuestSelection(12, 4, dense_threshold=13),
        ExactTopK(11),
        ExactTopK(11, shared=False),
    ]


@pytest.mark.parametrize(
    ("number", "heads", "dim"),
    [
        *[(0, "mha", 128), (1, "mqa", 64), (2, "gqa3", 64), (2, "gqa4", 128)],
        *[(3, "gqa4", 128), (3, "gqa3", 64), (4, "mha", 128), (5, "mqa", 64)],
        *[(6, "gqa3", 64), (6, "mha", 128), (7, "mqa", 64), (8, "gqa4", 128)],
    ],
)
def test_decoding_from_nothing_to_a_full_view(number, heads, dim):
    """One slot from the first step on, two that join later, one that never does and stays empty."""
    method, (count, kv_heads), joins = methods(dim)[number], HEADS[heads], np.array([0, 17, STEPS, 40])
    q = normal(number, STEPS, 4, count, dim)
    k, v = (normal(number + i, STEPS, 4, kv_heads, dim) for i in (20, 40))
    active = np.arange(STEPS)[:, None] >= joins
    (*_, used, bounds), (scores, chosen, out) = decode_steps(method, q, k, v, active)
    assert used.tolist() == [48, 31, 0, 8]
    sure = 0
    for step in (0, 11, 13, 30, 47):
        entries = np.maximum(step + 1 - joins, 0)
        views = Views.draw(heads, dim, STEPS, tuple(entries))
        views.q = q[step]
        for slot, held in enumerate(entries):
            views.k[slot, :, :held] = k[joins[slot] : step + 1, slot].swapaxes(0, 1)
            views.v[slot, :, :held] = v[joins[slot] : step + 1, slot].swapaxes(0, 1)
        now = jax.tree.map(lambda x, step=step: x[step], (scores, chosen, out))
        sure += check_step(method, views, *now)
    assert sure >= 0.9 * 8 * scores.shape[2]  # eight views that hold something
    if bounds is not None:
        for slot, head in np.ndindex(4, kv_heads):
            rebuilt = oracle.pages_of(views.head(slot, head)[1], method.summary)
            for page, pair in enumerate(rebuilt):
                np.testing.assert_array_equal(bounds[slot, head, page], pair)
            assert np.isnan(bounds[slot, head, len(rebuilt) :]).all()


SMALL = [
    HybridTokens(7, 5, 3, dense_threshold=9),
    HybridTokens(7, 8, 1),
    HybridPages(9, 4, dense_threshold=10),
    QuestSelection(8, 4, dense_threshold=9),
    ExactTopK(7, shared=False),
]
ENTRIES = st.tuples(*[st.integers(0, 24)] * 3)
SEEDS = st.integers(0, 10_000)


@hypothesis.settings(max_examples=25)
@hypothesis.given(method=st.sampled_from(SMALL), entries=ENTRIES, seed=SEEDS)
def test_equal_scores_are_read_in_order(method, entries, seed):
    """Whole numbers leave rounding no say: sets are the oracle's to the entry, with all the ties they have."""
    views = Views.draw("gqa3" if method.per_head else "mha", 8, 24, entries, seed, of=integers)
    views.q[..., 0] += 5  # never a query of zeros, which asks for nothing
    scores, selection, out = run(method, *views.arrays)
    check_step(method, views, scores, selection, out)
    for slot, row in np.ndindex(selection.units.shape[:2]):
        head, number = divmod(row, 3) if method.per_head else (row, 0)
        if entries[slot]:
            q, keys, _ = views.head(slot, head)
            read = read_of(method, *(np.asarray(x)[slot, row] for x in (selection.units, selection.chosen)), len(keys))
            assert read == rows_of(method, q, keys, views.scale)[number].read


@hypothesis.settings(max_examples=20)
@hypothesis.given(method=st.sampled_from(SMALL), entries=ENTRIES, seed=SEEDS)
def test_a_slot_is_alone_in_its_batch(method, entries, seed):
    """To the bit what it gives beside other slots, in another place, and with other rubbish in its empty entries."""
    views = Views.draw("gqa3", 8, 24, entries, seed)
    other = Views.draw("gqa3", 8, 24, (7, 24, entries[0]), seed + 9)
    for first, second in zip(views.arrays, other.arrays, strict=True):
        second[2] = first[0]
    rubbish = 1e4 * normal(seed, 2, 24 - entries[0], 8)
    other.k[2, :, entries[0] :], other.v[2, :, entries[0] :] = rubbish, -rubbish
    (_, first, out), (_, second, moved) = run(method, *views.arrays), run(method, *other.arrays)
    np.testing.assert_array_equal(first.chosen[0], second.chosen[2])
    np.testing.assert_array_equal(first.units[0][first.chosen[0]], second.units[2][second.chosen[2]])
    np.testing.assert_array_equal(out[0], moved[2])


@pytest.mark.parametrize("method", [SMALL[0], SMALL[2]], ids=repr)
def test_a_batch_of_one(method):
    views = Views.draw("gqa3", 8, 24, (21, 24, 9))
    alone = Views(*(x[:1] for x in views.arrays))
    (_, first, out), (_, second, one) = run(method, *views.arrays), run(method, *alone.arrays)
    np.testing.assert_array_equal(first.units[0][first.chosen[0]], second.units[0][second.chosen[0]])
    np.testing.assert_allclose(out[0], one[0], rtol=1e-6, atol=1e-7)


@in_numpy
@jax.jit
def dense_threshold(q, k, v, positions, entries):
    asking = jnp.full(entries.shape, 1_000_000)
    return decode_attention(q, k, v, positions, asking, entries, scale=q.shape[-1] ** -0.5)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    method=st.sampled_from([*SMALL, HybridTokens(24, 8, 3), HybridPages(24, 4)]), entries=ENTRIES, seed=SEEDS
)
def test_reading_everything_is_dense_attention(method, entries, seed):
    """As many tokens as a slot holds, of whatever dims they were chosen by, or a slot that is short enough for that."""
    most = max(method.dense_threshold, method.tokens // method.unit * method.unit)
    views = Views.draw("gqa3", 8, 24, tuple(min(held, most) for held in entries), seed)
    out = run(method, *views.arrays)[2]
    np.testing.assert_allclose(out, dense_threshold(*views.arrays), rtol=1e-5, atol=1e-6)


@hypothesis.settings(max_examples=15)
@hypothesis.given(dims=st.sampled_from([3, 8]), held=st.integers(1, 24), seed=SEEDS)
def test_pages_of_one_entry_are_sparq_over_the_group(dims, held, seed):
    views = Views.draw("gqa3", 8, 24, (held, 0, 24), seed)
    scores = run(HybridTokens(7, dims, 1), *views.arrays)[0]
    for head in range(2):
        q, keys, _ = views.head(0, head)
        np.testing.assert_allclose(scores[0, head, :held], oracle.sparq(q, keys, dims), rtol=2e-5)


def test_heads_that_cancel_meet_the_minimum():
    """A sum of zero is not positive."""
    views = Views.draw("gqa3", 8, 24, (24, 17, 5))
    for first in (0, 3):
        views.q[:, first + 1, :6], views.q[:, first + 2, :6] = -views.q[:, first, :6], 0
    scores = run(SMALL[0], *views.arrays)[0]
    for slot, head in np.ndindex(3, 2):
        q, keys, _ = views.head(slot, head)
        np.testing.assert_allclose(scores[slot, head, : len(keys)], oracle.hybrid(q, keys, 3, 5), rtol=2e-5)


@hypothesis.settings(max_examples=10)
@hypothesis.given(held=st.integers(1, 24), seed=SEEDS)
def test_all_dims_of_a_head_alone_are_quests_bound(held, seed):
    """The temperature is sqrt(D) then: the scores are the softmax of the bounds over the entries."""
    views = Views.draw("mha", 8, 24, (held, 0, 24), seed)
    weights, bounds = (run(method, *views.arrays)[0] for method in (HybridTokens(7, 8, 3), QuestSelection(6, 3)))
    for head in range(2):
        spread = np.repeat(np.asarray(bounds, np.float64)[0, head], 3)[:held]
        np.testing.assert_allclose(weights[0, head, :held], oracle.softmax(spread * views.scale), rtol=2e-5)
        logits = views.head(0, head)[1] @ views.q[0, head]
        assert (spread >= logits - 1e-5).all()


def test_a_slot_moved_with_its_summary_made_anew_reads_the_same():
    """A view that comes back from storage brings no summary: one made at once chooses as one made while decoding."""
    method = HybridTokens(12, 4, 3)
    q, k, v = normal(0, STEPS, 1, 6, 8), normal(1, STEPS, 1, 2, 8), normal(2, STEPS, 1, 2, 8)
    _, (scores, chosen, out) = decode_steps(method, q, k, v, np.ones((STEPS, 1), bool))
    last = STEPS - 1
    views = Views.draw("gqa3", 8, STEPS, (3, STEPS))
    views.q[1] = q[last, 0]
    views.k[1], views.v[1] = k[:, 0].swapaxes(0, 1), v[:, 0].swapaxes(0, 1)
    again, restored, restored_out = run(method, *views.arrays)
    np.testing.assert_allclose(again[1], scores[last, 0], rtol=1e-6)
    np.testing.assert_array_equal(restored.units[1], chosen.units[last, 0])
    np.testing.assert_array_equal(restored.chosen[1], chosen.chosen[last, 0])
    np.testing.assert_allclose(restored_out[1], out[last, 0], rtol=1e-6, atol=1e-7)


def test_a_step_of_the_papers_smallest_budget():
    """256 tokens of a context of 8,192: views of 1,448 entries, pages of 3, 67 dims, 128 tokens read."""
    method = HybridTokens(128, 67, 3)
    views = Views.draw("gqa4", 128, 1448, (1448, 1321))
    assert check_step(method, views, *run(method, *views.arrays)) == 4


def test_what_a_step_reads_is_about_the_budget():
    """Half of it to estimate, half to attend: together `t` pairs of K and V."""
    method = HybridTokens(128, 67, 3)
    assert method.read_bytes(1448, 128, 2) == (67 * 483 + 2 * 128 * 128) * 2
    assert method.read_bytes(1448, 128, 2) == pytest.approx(256 * 2 * 128 * 2, rel=0.01)
    assert method.retained_bytes(1448, 128, 2) == (1448 * 2 * 128 + 2 * 128 * 483) * 2
    assert (
        HybridTokens(2048, 76, 1).retained_bytes(6841, 128, 2) == 6841 * 2 * 128 * 2
    )  # pages of 1 are their own summary
    pages = HybridPages(512, 16, dense_threshold=512)
    assert pages.read_bytes(512, 128, 2, group=4) == 512 * 2 * 128 * 2
    assert pages.read_bytes(513, 128, 2, group=4) == (33 + 512) * 2 * 128 * 2
    assert QuestSelection(512, 16).read_bytes(1600, 128, 2, group=4) == (100 + 4 * 512) * 2 * 128 * 2
    assert ExactTopK(64).read_bytes(1600, 128, 2, group=4) == (1600 + 2 * 64) * 128 * 2
