"""Eviction as a measurement, against an oracle in NumPy and against attention that cannot see what is gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.model_card.eviction import (
    TAIL,
    EvictionCase,
    EvictionMeasurement,
    UniformEviction,
    evicting,
    retained_mask,
)
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig, causal_attention, random

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=64,
    width=32,
    mlp_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerConfig(RopeConfig(8, 1e4)),) * 2,
    query_scale=1.0,
    norm_eps=1e-6,
    max_position=256,
    qk_norm=True,
)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def oracle(eviction, q, k, boundary, scale):
    """Written from the description, one number at a time."""
    window, kv_heads, group, _ = q.shape
    first = boundary - window
    keep = np.zeros((kv_heads, k.shape[0]), bool)
    for head in range(kv_heads):
        total = np.zeros(first)
        for g in range(group):
            for w in range(window):
                weights = softmax(k[: first + w + 1, head].astype(np.float64) @ q[w, head, g] * scale)
                total += weights[:first]
        half = eviction.kernel // 2
        pooled = [total[max(0, i - half) : i + half + 1].max() for i in range(first)]
        order = sorted(range(first), key=lambda i: (-np.float32(pooled[i]), i))
        keep[head, order[: eviction.budget - window]] = True
        keep[head, first:boundary] = True
    return keep


@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize(("boundary", "budget"), [(40, 12), (50, 40), (12, 30), (4, 4)])
def test_what_stays_is_what_the_description_says(boundary, budget, kernel):
    rng = np.random.default_rng(boundary + kernel)
    q, k = rng.normal(size=(4, 2, 2, 8)).astype(np.float32), rng.normal(size=(60, 2, 8)).astype(np.float32)
    eviction = UniformEviction(budget, 4, kernel)
    found = np.asarray(retained_mask(eviction, jnp.asarray(q), jnp.asarray(k), jnp.array(boundary), 0.5))
    wanted = oracle(eviction, q, k, boundary, 0.5)
    if kernel == 1:
        np.testing.assert_array_equal(found, wanted)
    assert (found.sum(axis=1) == min(budget, boundary)).all()
    # pooling makes ties that rounding may order otherwise: at least the neighbourhoods agree
    assert (found == wanted).mean() > 0.95
    assert not found[:, boundary:].any()


@pytest.fixture(scope="module")
def attended():
    """q, k, v of two sequences, where each one is compressed, and dense and evicted attention."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 120, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    boundary = jnp.array([50, 30])
    eviction = UniformEviction(16, 8, 3)
    found = evicting(eviction, boundary)(CONFIG, CONFIG.layers[0])(q, k, v)
    return eviction, q, k, v, boundary, causal_attention(CONFIG, CONFIG.layers[0])(q, k, v), found


def test_the_prompt_is_read_densely_and_what_follows_sees_only_what_stayed(attended):
    eviction, q, k, v, boundary, dense, found = attended
    for row, end in enumerate(boundary.tolist()):
        np.testing.assert_array_equal(found[row, :end], dense[row, :end])
        observing = np.asarray(q)[row, end - eviction.window : end].reshape(-1, 2, 2, 8)
        stay = oracle(eviction, observing, np.asarray(k)[row], end, 1.0)
        for position in (end, end + 5, end + TAIL - 1):
            for head in range(4):
                places = [t for t in range(position + 1) if t >= end or stay[head // 2, t]]
                weights = softmax(np.asarray(k)[row, places, head // 2] @ np.asarray(q)[row, position, head])
                wanted = weights @ np.asarray(v)[row, places, head // 2]
                np.testing.assert_allclose(found[row, position, head], wanted, atol=1e-5)


def test_a_budget_that_holds_all_loses_nothing(attended):
    _, q, k, v, boundary, dense, _ = attended
    found = evicting(UniformEviction(64, 8, 3), boundary)(CONFIG, CONFIG.layers[0])(q, k, v)
    np.testing.assert_allclose(found, dense, atol=1e-5)


def test_a_reply_is_right_when_greedy_decoding_writes_it():
    decoder = random(CONFIG, jax.random.key(1), embedding_std=1.0)
    measurement = EvictionMeasurement(decoder, None)
    prompt = np.random.default_rng(2).integers(0, 64, size=20).tolist()
    ids = list(prompt)
    logits = jax.jit(lambda tokens: decoder(tokens))
    for _ in range(3):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(logits(padded)[0, len(ids) - 1])))
    wrong = [*ids[:-1], (ids[-1] + 1) % 64]
    cases = [EvictionCase(ids, 20, 3), EvictionCase(wrong, 20, 3), EvictionCase(ids, 18, 3)]
    assert measurement.right(cases, 32, None, 2) == [True, False, True]
    assert measurement.right(cases, 32, UniformEviction(32, 8), 2) == [True, False, True]
    with pytest.raises(ValueError, match="at least window=24"):
        measurement.right(cases, 32, UniformEviction(32, 24), 2)


@pytest.mark.parametrize(
    ("fields", "text"), [((8, 16), "at least window=16"), ((8, 4, 2), "odd"), ((8, 0), "window=0")]
)
def test_sizes_that_do_not_fit_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        UniformEviction(*fields)
