"""Confidence intervals of mean scores, by scipy, which is slow to import: the first interval does it."""

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # scores drawn at a time: megabytes, however many there are


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` trials (Wilson 1927).

    Args:
        mean: the share; where it is no whole number of the trials, the nearest counts.

    Raises:
        ValueError: no trials, or a mean outside [0, 1].
    """
    from scipy import stats

    if count < 1 or not 0.0 <= mean <= 1.0:
        raise ValueError(f"a share in [0, 1] of at least one trial is needed, got {mean} of {count}")
    interval = stats.binomtest(round(mean * count), count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """The mean of scores in [0, 1] and the two ends of its 95% interval.

    Scores that are all 0 or 1 have Wilson's interval, which is honest about ten right of ten. Others have the
    percentile bootstrap: the middle 95% of the means of 10,000 resamples, with a fixed seed, so that a table comes
    out the same again. Its width is 0 if all scores are equal: then it says nothing.

    Raises:
        ValueError: no scores, or one outside [0, 1].
    """
    from scipy import stats

    values = np.asarray(scores, np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"at least one score, each in [0, 1], is needed, got {list(scores)[:8]}")
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return mean, *wilson_interval(mean, values.size)
    if (values == values[0]).all():
        return mean, mean, mean  # of which the bootstrap of a single score is none to scipy
    drawn = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=max(1, _AT_ONCE // values.size),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return mean, float(drawn.low), float(drawn.high)
