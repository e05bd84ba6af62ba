"""Intervals of means: against known cases, another bootstrap, and the truth they should cover."""

import numpy as np
import pytest
from scipy import stats

from kvjax.eval.metrics import mean_interval, wilson_interval


def test_wilson_interval_of_known_cases():
    # 0 of 10 and 10 of 10: Wilson's bound is z^2 / (n + z^2) away from the end
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.72246, 1.0), abs=1e-4)
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0.5, 0)


def test_scores_of_0_and_1_have_wilsons_interval():
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == (0.75, *wilson_interval(0.75, 4))
    assert mean_interval([1.0]) == (1.0, *wilson_interval(1.0, 1))


def test_other_scores_have_the_bootstraps_which_is_scipys():
    scores = np.random.default_rng(1).beta(2, 5, size=40)
    mean, low, high = mean_interval(list(scores))
    other = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert mean == pytest.approx(scores.mean())
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.003)
    assert mean_interval(list(scores)) == (mean, low, high)  # the same again


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        _, low, high = mean_interval(list(rng.beta(2, 2, size=50)))
        inside += low <= 0.5 <= high
    assert inside >= 51  # 95% of 60 is 57; fewer than 51 has probability 1e-3


def test_equal_scores_and_impossible_ones():
    assert mean_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    for wrong in ([], [1.2], [-0.1, 0.5], [float("nan")]):
        with pytest.raises(ValueError, match=r"at least one score, each in \[0, 1\]"):
            mean_interval(wrong)
