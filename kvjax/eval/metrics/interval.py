"""Confidence intervals of mean scores."""

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # scores drawn at a time: megabytes, however many there are


def wilson_interval(mean: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share seen in `count` trials (Wilson 1927); 95% by default.

    Raises:
        ValueError: no trials, or a mean outside [0, 1].
    """
    if count < 1 or not 0.0 <= mean <= 1.0:
        raise ValueError(f"a share in [0, 1] of at least one trial is needed, got {mean} of {count}")
    centre = mean + z * z / (2 * count)
    spread = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """The mean of scores in [0, 1] and the two ends of its 95% interval.

    Scores that are all 0 or 1 have Wilson's interval, which is honest about ten right of ten. Others have the
    percentile bootstrap: the middle 95% of the means of 10,000 resamples, with a fixed seed, so that a table comes
    out the same again. Its width is 0 if all scores are equal: then it says nothing.

    Raises:
        ValueError: no scores, or one outside [0, 1].
    """
    values = np.asarray(scores, np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"at least one score, each in [0, 1], is needed, got {list(scores)[:8]}")
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return mean, *wilson_interval(mean, values.size)
    rng = np.random.default_rng(0)
    rows = max(1, _AT_ONCE // values.size)
    means = [
        values[rng.integers(values.size, size=(min(rows, _RESAMPLES - start), values.size))].mean(axis=1)
        for start in range(0, _RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return mean, float(low), float(high)
