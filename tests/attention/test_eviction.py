"""Stage 1 as a whole, for every method: chunks of a prompt enter a ring, positions are chosen, a view is gathered."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import decode_attention
from kvjax.attention.eviction import Eviction, Observation, PromptState, Streaming
from kvjax.attention.observation import last_queries, observe
from kvjax.attention.retention import gather
from kvjax.cache import Workspace
from tests.attention import rocketkv_oracle as oracle
from tests.attention.views import HEADS, normal

SCALE, DIM, ROOM, KEEP, CAPACITY = 0.4, 8, 96, 24, 30
METHODS = [
    Observation(8, kernel=63),
    Observation(8, kernel=7, per_head=True),
    Observation(5, kernel=1),
    Streaming(sinks=4),
    Streaming(6, sinks=0, per_head=True),
]
each_method = pytest.mark.parametrize("eviction", METHODS, ids=repr)
LENGTHS = st.one_of(st.integers(1, 90), st.sampled_from([1, 7, 8, 9, KEEP, KEEP + 1]))
SEEDS = st.integers(0, 10_000)


def run(*arguments, **sizes):
    """In NumPy: each index into an array of JAX would be compiled."""
    return jax.device_get(compiled(*arguments, **sizes))


@functools.partial(jax.jit, static_argnames=("eviction", "max_retained", "capacity", "chunk"))
def compiled(
    eviction: Eviction, q, k, v, length, turn=None, budget=None, max_retained=KEEP, capacity=CAPACITY, chunk=4
):
    """From queries [T, H, D], keys and values [K, T, D] of a prompt in its room to positions and a view."""
    ring = jnp.full((eviction.window, *q.shape[1:]), jnp.nan)  # as whatever was here before

    def enter(index, ring):
        rows = jax.lax.dynamic_slice_in_dim(q, index * chunk, chunk)
        return observe(ring, rows, index * chunk, length)

    ring = jax.lax.fori_loop(0, (length + chunk - 1) // chunk, enter, ring)
    state = PromptState(last_queries(ring, length), k, v, length, 0 if turn is None else length - turn, scale=SCALE)
    positions = eviction.select(state, max_retained=max_retained, capacity=capacity, budget=budget)
    return positions, gather(Workspace(k, v), positions)


def prompt(length: int, seed: int = 0, headroom: int = ROOM, heads: str = "gqa3"):
    """NaN behind the prompt: what an earlier request may have left there."""
    count, kv_heads = HEADS[heads]
    q, k, v = normal(seed, 90, count, DIM), normal(seed + 1, kv_heads, 90, DIM), normal(seed + 2, kv_heads, 90, DIM)
    q, k, v = q[:length], k[:, :length], v[:, :length]
    behind = headroom - length
    padding = [(0, 0), (0, behind), (0, 0)]
    k, v = (np.pad(x, padding, constant_values=np.nan) for x in (k, v))
    return np.pad(q, [(0, behind), (0, 0), (0, 0)], constant_values=np.nan), k, v, np.int32(length)


def check(eviction: Eviction, positions, q, k, length: int, turn: int | None = None, max_retained: int = KEEP):
    """Ascending, then -1; whole if it fits; else the oracle's choice, which no rounding of the scores may excuse."""
    observed = min(eviction.window, length if turn is None else turn)
    rows, retained = q.shape[1] if eviction.per_head else k.shape[0], min(length, max_retained)
    got = positions
    assert got.shape[0] == rows
    assert (got[:, retained:] == -1).all()
    assert (got[:, :1] >= 0).all()
    assert (np.diff(got[:, :retained]) > 0).all()
    assert (got[:, retained - observed : retained] == np.arange(length - observed, length)).all()
    if length <= max_retained:
        return
    if isinstance(eviction, Streaming):
        np.testing.assert_array_equal(
            got[:, :retained], [oracle.streaming(length, eviction.sinks, max_retained)] * rows
        )
        return
    queries = q[max(0, length - eviction.window) : length]
    scores = oracle.stage1_scores(queries, k, length, observed, SCALE, eviction.kernel, eviction.per_head)
    for row, score in zip(got, scores, strict=True):
        inside = np.isin(np.arange(length - observed), row[:retained])
        assert inside.sum() == max_retained - observed
        if max_retained == observed:
            continue
        assert score[inside].min() >= score[~inside].max() * (1 - 4e-5)
        if oracle.decided(np.log(score), max_retained - observed, 4e-5):
            np.testing.assert_array_equal(
                np.flatnonzero(inside), sorted(oracle.stable_top(score, max_retained - observed))
            )


@pytest.mark.parametrize(("heads", "number"), [("mha", 0), ("mqa", 1), ("gqa4", 2), ("mqa", 3), ("gqa4", 4)])
def test_other_groups_of_heads(heads, number):
    eviction = METHODS[number]
    q, k, v, length = prompt(90, 5, heads=heads)
    positions, _ = run(eviction, q, k, v, length)
    check(eviction, positions, q, k, 90)


@hypothesis.settings(max_examples=40)
@hypothesis.given(eviction=st.sampled_from(METHODS), length=LENGTHS, seed=SEEDS)
def test_any_prompt(eviction, length, seed):
    """Also one that fills no window, one that just fits, and one that just does not."""
    q, k, v, tokens = prompt(length, seed)
    positions, view = run(eviction, q, k, v, tokens)
    check(eviction, positions, q, k, length)
    retained, rows = min(length, KEEP), positions.shape[0]
    assert view.used.tolist() == [retained]
    np.testing.assert_array_equal(view.positions[0], positions)
    for row in range(rows):
        places = positions[row, :retained]
        for got, source in ((view.k, k), (view.v, v)):
            np.testing.assert_array_equal(got[0, row, :retained], source[row // (rows // 2), places])
            assert (got[0, row, retained:] == 0).all()


@each_method
def test_chunks_and_padding_choose_what_one_shot_chooses(eviction):
    """To the bit for chunks; more room behind the prompt changes how sums are blocked, but not the choice."""
    for length in (90, 81, 6):
        chunks, _ = run(eviction, *prompt(length))
        np.testing.assert_array_equal(chunks, run(eviction, *prompt(length), chunk=ROOM)[0])
        q, k, v, tokens = prompt(length, headroom=608)
        check(eviction, run(eviction, q, k, v, tokens)[0], q, k, length)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    eviction=st.sampled_from(METHODS), length=LENGTHS, seed=SEEDS, turn=st.integers(1, 12), budget=st.integers(8, KEEP)
)
def test_a_turn_and_a_budget(eviction, length, seed, turn, budget):
    """The last turn alone asks, and stays, if it is shorter than the window; a budget keeps fewer than would fit."""
    turn = min(turn, length)
    q, k, v, tokens = prompt(length, seed)
    positions, view = run(eviction, q, k, v, tokens, np.int32(turn), np.int32(budget))
    check(eviction, positions, q, k, length, turn, budget)
    assert view.used.tolist() == [min(length, budget)]


@each_method
def test_a_traced_budget_keeps_what_a_static_one_keeps(eviction):
    budget = 13
    for length in (3, budget, budget + 1, 90):
        arguments = prompt(length, seed=length)
        traced, view = run(eviction, *arguments, np.int32(length), np.int32(budget))
        static, other = run(eviction, *arguments, max_retained=budget)
        np.testing.assert_array_equal(traced, static)
        jax.tree.map(np.testing.assert_array_equal, view, other)


@each_method
def test_the_first_turn_is_a_prompt_like_any_other(eviction):
    for length in (4, 90):
        turn, _ = run(eviction, *prompt(length), np.int32(length), np.int32(KEEP))
        np.testing.assert_array_equal(turn, run(eviction, *prompt(length))[0])


def test_a_second_turn_chooses_from_the_whole_history_anew():
    """Its view holds tokens that the first turn's has dropped, for other queries ask."""
    eviction = Observation(8, kernel=1)
    q, k, v, _ = prompt(90, 11)
    first, _ = run(eviction, q, k, v, np.int32(50), np.int32(50), np.int32(KEEP))
    check(eviction, first, q, k, 50)
    for turn in (3, 40):
        second, _ = run(eviction, q, k, v, np.int32(50 + turn), np.int32(turn), np.int32(KEEP))
        check(eviction, second, q, k, 50 + turn, turn)
        for before, now in zip(first, second, strict=True):
            assert set(now[(now >= 0) & (now < 50)]) - set(before)


@each_method
def test_attention_over_a_view_is_attention_over_what_was_kept(eviction):
    """A head keeps what it attends to, and every key is still the key of its position."""
    q, k, v, length = prompt(90, 3)
    positions, view = run(eviction, q, k, v, length)
    ask, at = jnp.asarray(normal(9, 1, 6, DIM)), jnp.array([90])
    view = jax.tree.map(jnp.asarray, view)
    got = np.asarray(decode_attention(ask, view.k, view.v, view.positions, at, view.used, scale=SCALE))
    for head in range(6):
        retained = positions[head if eviction.per_head else head // 3, :KEEP]
        want = oracle.attend(np.asarray(ask)[0, head : head + 1], k[head // 3], v[head // 3], retained.tolist(), SCALE)
        np.testing.assert_allclose(got[0, head], want[0], rtol=5e-4, atol=5e-4)


@each_method
def test_less_room_than_what_always_stays_is_refused(eviction):
    with pytest.raises(
        ValueError, match=f"max_retained={eviction.min_retained - 1} is below the {eviction.min_retained} tokens"
    ):
        run(eviction, *prompt(90), max_retained=eviction.min_retained - 1)
    with pytest.raises(ValueError, match="max_retained=31 is not in 1 to capacity=30"):
        run(eviction, *prompt(90), max_retained=31)


def test_windows_and_sinks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="window=0"):
        Observation(0)
    with pytest.raises(ValueError, match="sinks=-1"):
        Streaming(sinks=-1)
