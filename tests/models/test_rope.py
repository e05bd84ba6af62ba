"""Rotary embedding by what it means: only distances count, and each scaling bends the right frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models.rope import Linear, Llama3, LongRope, RopeConfig, Yarn, rotate, rotation

LLAMA3 = Llama3(8.0, 1.0, 4.0, 8192)
SCALINGS = [None, Linear(8.0), LLAMA3, Yarn(4.0, 2048), LongRope((1.0,) * 16, (3.0,) * 16, 64, 4.0)]


@functools.partial(jax.jit, static_argnums=0)
def turn(config, x, positions):
    return rotate(x, *rotation(config, positions))


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: type(s).__name__)
def test_scores_depend_on_distance_only(scaling):
    config = RopeConfig(32, 1e4, scaling)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 40))
    at = [(100, 93), (7, 0), (1007, 1000)]
    scores = [(turn(config, q, jnp.array([i])) * turn(config, k, jnp.array([j]))).sum() for i, j in at]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-3)
    other = (turn(config, q, jnp.array([9])) * turn(config, k, jnp.array([0]))).sum()
    assert abs(other - scores[0]) > 1e-2


def test_dimensions_beyond_the_rotated_ones_pass_through():
    x = jax.random.normal(jax.random.key(0), (5, 2, 12))
    turned = turn(RopeConfig(8, 1e4), x, jnp.arange(5))
    np.testing.assert_array_equal(turned[..., 8:], x[..., 8:])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(turned[0], x[0])


def test_pairs_are_half_a_rotation_apart():
    x = jnp.zeros((1, 1, 8)).at[0, 0, 1].set(1.0)
    turned = turn(RopeConfig(8, 1e4), x, jnp.array([10]))[0, 0]
    angle = 10 * 1e4 ** (-2 / 8)
    np.testing.assert_allclose(turned[jnp.array([1, 5])], [np.cos(angle), np.sin(angle)], atol=1e-6)
    assert np.count_nonzero(turned) == 2


def test_linear_divides_every_frequency():
    plain, _ = RopeConfig(32, 1e4).frequencies()
    scaled, factor = RopeConfig(32, 1e4, Linear(4.0)).frequencies()
    np.testing.assert_allclose(scaled, plain / 4)
    assert factor == 1.0


def test_llama3_keeps_short_wavelengths_and_divides_long_ones():
    plain, _ = RopeConfig(128, 5e5).frequencies()
    scaled, _ = RopeConfig(128, 5e5, LLAMA3).frequencies()
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
    plain, _ = RopeConfig(128, 1e6).frequencies()
    scaled, factor = RopeConfig(128, 1e6, Yarn(4.0, 32768)).frequencies()
    turns = 32768 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 4)
    assert (np.diff(scaled) < 0).all()
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    assert RopeConfig(128, 1e6, Yarn(4.0, 32768, attention_factor=1.0)).frequencies()[1] == 1.0
    assert RopeConfig(128, 1e6, Yarn(4.0, 32768, mscale=1.0, mscale_all_dim=1.0)).frequencies()[1] == 1.0


def test_longrope_has_a_set_for_short_and_one_for_long_texts():
    plain, _ = RopeConfig(4, 1e4).frequencies()
    for use_long, divisors in ((False, [1.0, 2.0]), (True, [3.0, 4.0])):
        scaling = LongRope((1.0, 2.0), (3.0, 4.0), 4096, 32.0, use_long=use_long)
        scaled, factor = RopeConfig(4, 1e4, scaling).frequencies()
        np.testing.assert_allclose(scaled, plain / np.array(divisors, np.float32))
        assert factor == pytest.approx(np.sqrt(1 + np.log(32) / np.log(4096)))


def test_longrope_needs_a_factor_a_pair():
    config = RopeConfig(8, 1e4, LongRope((1.0,), (1.0,), 64, 2.0))
    with pytest.raises(ValueError, match="1 factors for 4 rotated pairs"):
        config.frequencies()


def test_frequencies_are_constants_of_a_trace():
    jaxpr = jax.make_jaxpr(lambda x, p: turn(RopeConfig(8, 1e4, LLAMA3), x, p))(jnp.ones((3, 2, 8)), jnp.arange(3))
    assert "pow" not in str(jaxpr)
