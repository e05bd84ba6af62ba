"""Stage 1: what the last queries look at, and which tokens stay for it."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.eviction import Observation, PromptState, Streaming
from kvjax.attention.observation import BLOCK, attention_received, last_queries, max_pool, observe
from kvjax.attention.retention import gather, retain
from kvjax.cache import Workspace
from tests.attention import rocketkv_oracle as oracle

SCALE = 0.3
HEADS = {"mha": (2, 2), "mqa": (4, 1), "gqa3": (6, 2), "gqa4": (8, 2)}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def prompt(heads, length, headroom, window, dim=8, seed=0):
    """Queries of the last `window` positions and keys of `headroom` positions, NaN where the prompt has none."""
    count, kv_heads = HEADS[heads]
    queries, k = normal(seed, window, count, dim), normal(seed + 1, kv_heads, headroom, dim)
    k[:, length:] = np.nan
    queries[: max(0, window - length)] = np.nan
    return queries, k


@functools.partial(jax.jit, static_argnames=("per_head",))
def run_received(queries, k, length, observed, per_head=False):
    return attention_received(queries, k, length, observed, scale=SCALE, per_head=per_head)


@functools.partial(jax.jit, static_argnames=("eviction", "max_retained", "capacity"))
def run_select(eviction, queries, k, length, max_retained, capacity, turn=None, budget=None):
    state = PromptState(queries, k, k, length, 0 if turn is None else length - turn, scale=SCALE)
    return eviction.select(state, max_retained=max_retained, capacity=capacity, budget=budget)


@functools.partial(jax.jit, static_argnames=("eviction", "max_retained"))
def run_scores_and_retain(eviction, queries, k, length, max_retained):
    state = PromptState(queries, k, k, length, scale=SCALE)
    scores = eviction.score(state)
    return scores, retain(scores, length, state.observed, max_retained=max_retained, capacity=max_retained + 2)


run_observe = jax.jit(observe)
run_last = jax.jit(last_queries)


def check_received(heads, length, headroom, window, observed, dim=8, seed=0, kinds=(False,)):
    queries, k = prompt(heads, length, headroom, window, dim, seed)
    want = oracle.received(queries, k, length, observed, SCALE)
    for per_head in kinds:
        got = np.asarray(run_received(queries, k, np.int32(length), np.int32(observed), per_head))
        summed = want if per_head else want.reshape(k.shape[0], -1, length).sum(axis=1)
        np.testing.assert_allclose(got[:, :length], summed, rtol=2e-5, atol=1e-9)
        assert (got[:, length:] == 0).all()


@pytest.mark.parametrize(("heads", "dim"), [("mha", 64), ("mqa", 128), ("gqa3", 128), ("gqa4", 64)])
def test_weights_agree_with_numpy(heads, dim):
    check_received(heads, length=40, headroom=48, window=8, observed=8, dim=dim)


def test_weights_of_each_head_agree_with_numpy():
    check_received("gqa3", length=40, headroom=48, window=8, observed=8, kinds=(True,))


@pytest.mark.parametrize(
    ("length", "headroom", "observed"),
    [
        (1, 1, 1),
        (3, 8, 3),  # shorter than the window
        (BLOCK, BLOCK, 8),
        (BLOCK + 1, BLOCK + 1, 8),  # the last block steps back
        (BLOCK + 3, 700, 2),
        (1100, 1100, 8),
        (700, 1536, 8),  # a whole block of room behind the prompt
    ],
)
def test_weights_at_the_borders_of_blocks(length, headroom, observed):
    check_received("gqa3", length, headroom, 8, observed, dim=4)


def test_weights_of_a_query_sum_to_one():
    queries, k = prompt("gqa3", 600, 640, 8)
    got = np.asarray(run_received(queries, k, np.int32(600), np.int32(5)))
    np.testing.assert_allclose(got.sum(axis=1), 5 * 3, rtol=1e-5)


def test_large_scores_do_not_overflow():
    queries, k = prompt("mha", 530, 530, 4)
    got = np.asarray(run_received(queries * 1e3, k * 1e3, np.int32(530), np.int32(4)))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(axis=1), 4, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "end"), [(1, 20), (3, 5), (7, 20), (7, 1), (63, 20)])
def test_pooling(kernel, end):
    scores = normal(0, 3, 20)
    got = np.asarray(max_pool(jnp.asarray(scores), kernel, jnp.int32(end)))
    for row, want in zip(got, scores, strict=True):
        np.testing.assert_array_equal(row[:end], oracle.pooled(want[:end], kernel))


@pytest.mark.parametrize("kernel", [0, 2, 62, -1])
def test_a_kernel_has_a_middle(kernel):
    with pytest.raises(ValueError, match="odd"):
        Observation(kernel=kernel)
    with pytest.raises(ValueError, match="odd"):
        max_pool(jnp.zeros((1, 4)), kernel, jnp.int32(4))


# The ring of queries


@pytest.mark.parametrize(
    ("window", "chunk", "length"), [(1, 4, 30), (8, 4, 30), (8, 4, 32), (5, 8, 33), (8, 16, 3), (5, 40, 33), (8, 8, 17)]
)
def test_a_ring_filled_in_chunks_holds_the_last_queries(window, chunk, length):
    """Whatever the chunk, also where the last one is padded, and whatever the ring held before."""
    q = normal(0, -(-length // chunk) * chunk, 2, 4)
    q[length:] = np.nan
    ring = jnp.full((window, 2, 4), 7.0)
    for start in range(0, length, chunk):
        ring = run_observe(ring, q[start : start + chunk], np.int32(start), np.int32(length))
    count = min(window, length)
    np.testing.assert_array_equal(run_last(ring, np.int32(length))[window - count :], q[length - count : length])


def test_a_chunk_of_padding_alone_changes_nothing():
    ring = jnp.asarray(normal(0, 4, 2, 4))
    np.testing.assert_array_equal(run_observe(ring, normal(1, 8, 2, 4), np.int32(16), np.int32(16)), ring)
    np.testing.assert_array_equal(run_observe(ring, normal(1, 8, 2, 4), np.int32(24), np.int32(16)), ring)


def test_chunks_select_what_one_shot_selects():
    eviction, length = Observation(8, kernel=5), 61
    q, k = normal(0, 64, 6, 8), normal(1, 2, 64, 8)
    retained = []
    for chunk in (4, 16, 64):
        ring = jnp.zeros((8, 6, 8))
        for start in range(0, 64, chunk):
            ring = run_observe(ring, q[start : start + chunk], np.int32(start), np.int32(length))
        retained.append(np.asarray(run_select(eviction, run_last(ring, np.int32(length)), k, np.int32(length), 24, 32)))
    np.testing.assert_array_equal(retained[0], retained[2])
    np.testing.assert_array_equal(retained[1], retained[2])


# What stays


def check_retained(got, scores, length, observed, max_retained):
    """Ascending, then -1; the window; as many as fit; and no dropped token scores above a kept one."""
    for row, score in zip(np.asarray(got), scores, strict=True):
        count = min(length, max_retained)
        retained = row[:count]
        assert (row[count:] == -1).all()
        assert (np.diff(retained) > 0).all()
        assert retained[0] >= 0
        np.testing.assert_array_equal(retained[count - observed :], np.arange(length - observed, length))
        inside = np.zeros(length, bool)
        inside[retained] = True
        inside, score = inside[: length - observed], np.asarray(score, np.float64)
        if inside.any() and not inside.all():
            assert score[inside].min() >= score[~inside].max() * (1 - 2e-5)


@pytest.mark.parametrize(
    ("heads", "kernel", "per_head"),
    [
        ("mha", 63, False),
        ("mqa", 7, False),
        ("gqa3", 1, False),
        ("gqa4", 63, False),
        ("gqa3", 7, True),
        ("mqa", 1, True),
    ],
)
def test_kept_tokens_agree_with_numpy(heads, kernel, per_head):
    """With a kernel of 1 there are no ties and the sets are equal; wide kernels tie by construction."""
    queries, k = prompt(heads, 90, 96, 8)
    eviction = Observation(8, kernel=kernel, per_head=per_head)
    mine, got = (np.asarray(x) for x in run_scores_and_retain(eviction, queries, k, np.int32(90), 30))
    scores = oracle.stage1_scores(queries, k, 90, 8, SCALE, kernel, per_head)
    np.testing.assert_allclose(mine[:, :82], scores, rtol=2e-5)
    check_retained(got, scores, 90, 8, 30)
    assert got.shape == (HEADS[heads][0 if per_head else 1], 32)
    if kernel == 1:
        want = oracle.eviction(queries, k, 90, 8, SCALE, kernel, 30, per_head)
        np.testing.assert_array_equal(got[:, :30], want)


def test_the_window_does_not_leak_into_the_pool():
    """The window's tokens attend to themselves most; the place before it must not be kept for that."""
    queries, k = prompt("mha", 40, 40, 4, seed=3)
    k[:, 36:] *= 10
    eviction = Observation(4, kernel=9)
    scores = oracle.stage1_scores(queries, k, 40, 4, SCALE, 9)
    check_retained(run_select(eviction, queries, k, np.int32(40), 12, 12), scores, 40, 4, 12)


@pytest.mark.parametrize("length", [1, 3, 4, 19, 20, 21])
def test_a_prompt_that_fits_stays_whole(length):
    queries, k = prompt("gqa3", length, 32, 4)
    for eviction in (Observation(4, kernel=63), Streaming(sinks=2)):
        got = np.asarray(run_select(eviction, queries, k, np.int32(length), 20, 24))
        retained = min(length, 20)
        if length <= 20:
            np.testing.assert_array_equal(got[:, :retained], np.tile(np.arange(length), (2, 1)))
        assert (got[:, retained:] == -1).all()
        assert ((got >= 0).sum(axis=1) == retained).all()


def test_a_view_larger_than_the_workspace():
    queries, k = prompt("mqa", 10, 16, 4)
    got = np.asarray(run_select(Observation(4), queries, k, np.int32(10), 40, 50))
    np.testing.assert_array_equal(got[0], [*range(10), *[-1] * 40])


def test_ties_go_to_the_earlier_token():
    scores = jnp.array([[1.0, 2, 1, 2, 1, 1, 0, 0]])
    got = retain(scores, jnp.int32(8), jnp.int32(2), max_retained=5, capacity=6)
    np.testing.assert_array_equal(got, [[0, 1, 3, 6, 7, -1]])


@hypothesis.given(
    heads=st.sampled_from(sorted(HEADS)),
    length=st.integers(1, 60),
    observed=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_kept_scores_are_the_best(heads, length, observed, seed):
    observed = min(observed, length)
    queries, k = prompt(heads, length, 60, 6, dim=4, seed=seed)
    got = run_select(Observation(6, kernel=5), queries, k, np.int32(length), 20, 24, np.int32(observed))
    check_retained(got, oracle.stage1_scores(queries, k, length, observed, SCALE, 5), length, observed, 20)


@pytest.mark.parametrize("budget", [6, 13, 24])
def test_a_traced_budget_keeps_what_a_static_one_keeps(budget):
    """A search varies the number while it runs; a server has it compiled in."""
    eviction = Observation(6, kernel=5)
    for length in (5, 6, 12, 13, 23, 24, 25, 60):
        queries, k = prompt("gqa3", length, 60, 6, dim=4, seed=length)
        traced = run_select(eviction, queries, k, np.int32(length), 24, 24, np.int32(length), np.int32(budget))
        static = run_select(eviction, queries, k, np.int32(length), budget, 24)
        np.testing.assert_array_equal(traced, static)


def test_a_short_turn_observes_itself_alone():
    """Of a conversation only the last turn asks: its queries score the whole history, and it stays verbatim."""
    queries, k = prompt("gqa3", 50, 64, 8)
    eviction = Observation(8, kernel=1)
    first = run_select(eviction, queries, k, np.int32(50), 20, 20, np.int32(50))
    np.testing.assert_array_equal(first, run_select(eviction, queries, k, np.int32(50), 20, 20))
    got = run_select(eviction, queries, k, np.int32(50), 20, 20, np.int32(3))
    np.testing.assert_array_equal(got, oracle.eviction(queries, k, 50, 3, SCALE, 1, 20))


def test_streaming_keeps_the_first_and_the_last():
    queries, k = prompt("gqa3", 50, 64, 8)
    got = run_select(Streaming(sinks=3), queries, k, np.int32(50), 10, 12)
    np.testing.assert_array_equal(got, [[0, 1, 2, *range(43, 50), -1, -1]] * 2)


@pytest.mark.parametrize("eviction", [Observation(8), Streaming(sinks=7)])
def test_room_for_less_than_the_window_is_refused(eviction):
    queries, k = prompt("mha", 20, 20, 8)
    with pytest.raises(ValueError, match="max_retained=7 is below the 8"):
        run_select(eviction, queries, k, np.int32(20), 7, 16)
    with pytest.raises(ValueError, match="capacity=8"):
        run_select(eviction, queries, k, np.int32(20), 9, 8)


@pytest.mark.parametrize("per_head", [False, True])
def test_gathered_rows_are_those_of_the_positions(per_head):
    queries, k = prompt("gqa3", 50, 64, 8)
    v = normal(5, *k.shape)
    eviction = Observation(8, kernel=3, per_head=per_head)
    positions = run_select(eviction, queries, k, np.int32(50), 20, 24)
    view = jax.jit(gather)(Workspace(jnp.asarray(k), jnp.asarray(v)), positions)
    assert view.k.shape == (1, 6 if per_head else 2, 24, 8)
    assert view.used.tolist() == [20]
    assert np.isfinite(view.k).all()
    for row, places in enumerate(np.asarray(positions)):
        head = row // 3 if per_head else row
        np.testing.assert_array_equal(view.k[0, row, :20], k[head, places[:20]])
        np.testing.assert_array_equal(view.v[0, row, :20], v[head, places[:20]])
        assert (np.asarray(view.k[0, row, 20:]) == 0).all()
    np.testing.assert_array_equal(view.positions[0], positions)


def test_no_array_has_the_length_twice():
    """Temporaries grow with the prompt, not with its square, and keys are not repeated over the group."""
    spec = jax.ShapeDtypeStruct
    q, k, number = spec((32, 32, 64), jnp.float32), spec((1, 16384, 64), jnp.float32), spec((), jnp.int32)
    run = jax.jit(functools.partial(attention_received, scale=SCALE))
    memory = run.lower(q, k, number, number).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 16 * 2**20  # one block of scores takes 2 MiB; repeated keys 128 MiB
