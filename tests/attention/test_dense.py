"""Dense attention over a workspace and over a view, against NumPy in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import decode_attention, prefill_attention
from kvjax.attention.dense import DECODE_BLOCK, PREFILL_BLOCK, _decode
from tests.attention import oracle

SCALE = 0.4  # large enough that a few keys take most of the weight
TOLERANCE = 5e-6
HEADS = {"mha": (4, 4), "mqa": (4, 1), "gqa3": (6, 2)}
KINDS = [("mha", None), ("mqa", 7), ("gqa3", None), ("gqa3", 20)]  # few: each compiles


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("window",))
def run_prefill(q, k, v, start, window):
    return prefill_attention(q, k, v, start, scale=SCALE, window=window)


@functools.partial(jax.jit, static_argnames=("window", "at_once"))
def run_decode(q, k, v, positions, asking, entries, window, at_once=None):
    if at_once is None:
        return decode_attention(q, k, v, positions, asking, entries, scale=SCALE, window=window)
    return _decode(q, k, v, positions, asking, entries, at_once=at_once, scale=SCALE, window=window)


def check_prefill(heads, kv_heads, dim, tokens, start, chunk, window, seed=0):
    q = normal(seed, chunk, heads, dim)
    k, v = normal(seed + 1, kv_heads, tokens, dim), normal(seed + 2, kv_heads, tokens, dim)
    want = oracle.prefill(q, k, v, start, SCALE, window)
    # what lies behind the chunk is of an earlier request, which may even have overflowed
    k[:, start + chunk :] = np.nan
    v[:, start + chunk :] = np.nan
    got = run_prefill(q, k, v, np.int32(start), window)
    assert got.shape == q.shape
    assert got.dtype == q.dtype
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("heads", "window"), KINDS)
def test_prefill_agrees_with_numpy(heads, window):
    for start in (0, 32, 64):
        check_prefill(*HEADS[heads], 8, tokens=96, start=start, chunk=32, window=window)


@pytest.mark.parametrize(
    ("tokens", "chunk", "window", "starts"),
    [
        (1, 1, None, [0]),
        (PREFILL_BLOCK, 16, 3, [0, PREFILL_BLOCK - 16]),
        (PREFILL_BLOCK + 1, 4, None, [PREFILL_BLOCK - 3, PREFILL_BLOCK - 4]),  # the last block steps back
        (768, 8, None, [504, 508, 512, 760]),
        (768, 8, 1, [508, 760]),
        (1100, 8, PREFILL_BLOCK, [0, 508, 1019, 1020, 1021, 1092]),  # a window over the border of blocks
        (1100, 8, PREFILL_BLOCK + 1, [508, 512, 1019, 1020, 1021, 1024, 1092]),
        (1100, 8, 2000, [1092]),  # a window longer than everything
    ],
)
def test_prefill_at_the_borders_of_blocks(tokens, chunk, window, starts):
    for start in starts:
        check_prefill(2, 1, 4, tokens, start, chunk, window)


@hypothesis.given(
    shape=st.sampled_from([("mqa", 513, 24, 30), ("gqa3", 700, 24, None), ("mha", 40, 5, 511)]),
    at=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_prefill_anywhere(shape, at, seed):
    heads, tokens, chunk, window = shape
    check_prefill(*HEADS[heads], 4, tokens, int(at * (tokens - chunk)), chunk, window, seed)


@pytest.mark.parametrize("window", [None, 100])
def test_chunks_equal_one_shot(window):
    """The same rows whether a prompt comes in one chunk or in several, whatever the room behind it."""
    tokens, heads, kv_heads, dim = 700, 6, 2, 8
    q, k, v = normal(0, tokens, heads, dim), normal(1, kv_heads, tokens, dim), normal(2, kv_heads, tokens, dim)
    once = run_prefill(q, k, v, np.int32(0), window)
    for chunk, headroom in ((140, tokens), (100, 1536)):
        padded = [np.full((kv_heads, headroom, dim), 7, np.float32) for _ in range(2)]
        rows = []
        for start in range(0, tokens, chunk):
            for target, source in zip(padded, (k, v), strict=True):
                target[:, start : start + chunk] = source[:, start : start + chunk]
            rows.append(run_prefill(q[start : start + chunk], *padded, np.int32(start), window))
        np.testing.assert_allclose(np.concatenate(rows), once, atol=TOLERANCE)


def view(seed, slots, heads, kv_heads, dim, capacity, filled, *, holes=0.0, shuffle=False):
    """Arguments of `decode_attention`: slot b has `filled[b]` entries, its token asks at the last of its positions."""
    random = np.random.default_rng(seed)
    q = normal(seed, slots, heads, dim)
    k, v = normal(seed + 1, slots, kv_heads, capacity, dim), normal(seed + 2, slots, kv_heads, capacity, dim)
    positions = np.full((slots, kv_heads, capacity), -1, np.int32)
    asking = np.zeros(slots, np.int32)
    for slot, count in enumerate(filled):
        if not count:
            continue
        asking[slot] = count - 1 + 10 * slot
        for head in range(kv_heads):
            places = np.arange(count) + 10 * slot
            places[:-1][random.random(count - 1) < holes] = -1
            if shuffle:
                random.shuffle(places)
            positions[slot, head, :count] = places
    return q, k, v, positions, asking, np.array(filled, np.int32)


def check_decode(arguments, window):
    q, k, v, positions, asking, entries = arguments
    # an empty entry may hold anything: an earlier request may have overflowed
    k[positions < 0] = v[positions < 0] = np.nan
    want = oracle.decode(q, k, v, positions, asking, SCALE, window)
    decoding = entries > 0
    for at_once in (None, len(q)):  # on a CPU None is 1
        got = np.asarray(run_decode(*arguments, window, at_once))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[decoding], want[decoding], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("heads", "window"), KINDS)
def test_decode_agrees_with_numpy(heads, window):
    for shuffle in (False, True):
        check_decode(view(0, 3, *HEADS[heads], 8, 50, (50, 1, 33), shuffle=shuffle), window)


@pytest.mark.parametrize(
    ("capacity", "window", "filled"),
    [
        (1, None, [(1, 1)]),
        (DECODE_BLOCK - 1, 1, [(DECODE_BLOCK - 1, 100)]),
        (DECODE_BLOCK, None, [(DECODE_BLOCK, 1)]),
        (DECODE_BLOCK + 1, 100, [(DECODE_BLOCK + 1, DECODE_BLOCK), (1, DECODE_BLOCK - 1)]),
        (2 * DECODE_BLOCK, None, [(2 * DECODE_BLOCK, DECODE_BLOCK + 1), (2 * DECODE_BLOCK - 1, DECODE_BLOCK)]),
        (700, None, [(700, 513), (512, 511), (1, 700)]),
    ],
)
def test_decode_at_the_borders_of_blocks(capacity, window, filled):
    for counts in filled:
        check_decode(view(1, 2, 2, 1, 4, capacity, counts), window)


@hypothesis.given(
    shape=st.sampled_from([("mqa", 30, 7), ("gqa3", 600, None), ("mha", 300, 50)]),
    fill=st.tuples(*[st.floats(0, 1)] * 3),
    holes=st.sampled_from([0.0, 0.5, 0.99]),
    shuffle=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_decode_of_any_view(shape, fill, holes, shuffle, seed):
    heads, capacity, window = shape
    filled = tuple(round(share * capacity) for share in fill)
    check_decode(view(seed, 3, *HEADS[heads], 4, capacity, filled, holes=holes, shuffle=shuffle), window)


def test_empty_slots_are_finite_and_disturb_nobody():
    alone = view(3, 1, 6, 2, 8, 300, (290,))
    crowd = [np.concatenate([np.zeros_like(x), x, np.zeros_like(x)]) for x in alone]
    crowd[3][0] = -1  # an empty slot before, and one behind whose positions nobody ever wrote
    for at_once in (None, 3):
        got = np.asarray(run_decode(*crowd, None, at_once))
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got[1], run_decode(*alone, None)[0], atol=TOLERANCE)
    nobody = [*crowd[:5], np.zeros(3, np.int32)]
    assert np.isfinite(run_decode(*nobody, None, 3)).all()


def test_entries_bound_what_is_read():
    """What lies behind the last block of a slot's entries is not read at all, not even multiplied with zero."""
    arguments = list(view(4, 2, 2, 1, 4, 2 * DECODE_BLOCK, (DECODE_BLOCK, DECODE_BLOCK)))
    want = np.asarray(run_decode(*arguments, None, 1))
    arguments[2] = arguments[2].copy()
    arguments[2][:, :, DECODE_BLOCK:] = np.nan
    np.testing.assert_array_equal(run_decode(*arguments, None, 1), want)
    np.testing.assert_array_equal(run_decode(*arguments, None, 2), want)


def test_large_scores_do_not_overflow():
    q, k, v, positions, asking, entries = view(5, 2, 2, 1, 4, 300, (300, 280))
    check = run_decode(q * 1e3, k * 1e3, v, positions, asking, entries, None)
    best = np.argmax(np.where(positions >= 0, np.einsum("bhd,bkcd->bhc", q, k), -np.inf), axis=-1)
    np.testing.assert_allclose(check, np.stack([v[b, 0, best[b]] for b in range(2)]), rtol=1e-5)


def test_half_precision_caches_are_summed_in_float32():
    q, k, v, positions, asking, entries = view(6, 2, 6, 2, 8, 300, (300, 200))
    half = [x.astype(jnp.bfloat16) for x in (k, v)]
    want = oracle.decode(q, *[np.asarray(x, np.float32) for x in half], positions, asking, SCALE, None)
    got = run_decode(q, *half, positions, asking, entries, None)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-2)
    k, v = (x[0].astype(jnp.bfloat16) for x in (k, v))
    q = normal(7, 16, 6, 8)
    want = oracle.prefill(q, *[np.asarray(x, np.float32) for x in (k, v)], 284, SCALE, None)
    np.testing.assert_allclose(run_prefill(q, k, v, np.int32(284), None), want, atol=2e-2)
