"""Outcome: one candidate on the three sets of samples, with intervals, and the cost of finding it."""

import dataclasses

import numpy as np
from jaxtyping import Float

from kvjax.eval.metrics import mean_interval
from kvjax.search.samples import SetName
from kvjax.search.spaces import Candidate

FULL = "full cache"
SETS: tuple[SetName, ...] = ("search", "selection", "test")
Interval = tuple[float, float, float]  # a mean, and the two ends of its 95% interval


@dataclasses.dataclass(frozen=True)
class SetScore:
    """A mean over a set of samples, the 95% interval of it, and the mean log-probability of the answers."""

    mean: float
    low: float
    high: float
    log_probability: float
    samples: int

    @classmethod
    def of(cls, scores: Float[np.ndarray, "2 S"]) -> "SetScore":
        """Of the score and the log-probability of each sample."""
        return cls(*mean_interval(scores[0].tolist()), float(scores[1].mean()), scores.shape[1])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One candidate on the three sets.

    Attributes:
        name: of the allocator that found it.
        candidate: None for the full cache.
        gain: test score less that of uniform budgets on the same samples, with the 95% interval of the difference.
        evaluations, seconds: spent to find it.
        each: score of each test sample, so that any two outcomes of a search can be paired.
    """

    name: str
    candidate: Candidate | None
    search: SetScore
    selection: SetScore
    test: SetScore
    gain: Interval
    evaluations: int = 0
    seconds: float = 0.0
    each: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        candidate: Candidate | None,
        scores: dict[SetName, Float[np.ndarray, "2 _S"]],
        uniform: Float[np.ndarray, "S"],
        evaluations: int = 0,
        seconds: float = 0.0,
    ) -> "Outcome":
        """Of the score and the log-probability of each sample.

        Args:
            uniform: test scores of uniform budgets of the same cost.
        """
        search, selection, test = (SetScore.of(scores[name]) for name in SETS)
        each = scores["test"][0]
        gain = paired(each, uniform)
        return cls(name, candidate, search, selection, test, gain, evaluations, seconds, tuple(each.tolist()))

    @property
    def calibration_gap(self) -> float:
        """The score on the search set less that on the test set."""
        return self.search.mean - self.test.mean

    def over(self, other: "Outcome") -> Interval:
        """Its test score less another's on the same samples, with the 95% interval of the difference."""
        return paired(np.array(self.each), np.array(other.each))


def paired(scores: Float[np.ndarray, "S"], reference: Float[np.ndarray, "N"]) -> Interval:
    """The mean difference of scores in [0, 1] of the same samples, and its 95% interval.

    Raises:
        ValueError: they are not of as many samples.
    """
    if scores.shape != reference.shape:
        raise ValueError(f"{scores.size} scores cannot be paired with {reference.size}: score the same samples")
    middle, low, high = mean_interval(((scores - reference + 1) / 2).tolist())  # a difference lies in [-1, 1]
    return 2 * middle - 1, 2 * low - 1, 2 * high - 1
