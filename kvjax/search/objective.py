"""Objective: the fitness of a candidate, higher is better, from its scores and its cost."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from kvjax.search.evaluators.scores import Scores
from kvjax.search.spaces.tokens import cache_score

Measure = Literal["exact", "tokens"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The map from scores to fitness.

    Attributes:
        measure: of a reply: 'exact', or the share of its 'tokens' for tasks that few replies solve.
        paper: the paper's own: score * (1 + weight * CacheScore), ties and all. Otherwise the score alone, for the
            cost is fixed, and of equal scores the more probable answers.
        mean: the target of CacheScore, tokens a layer.
        weight: of CacheScore; 0.3 in the paper.
        of_group: CacheScore is of the layers that are searched together; else of the whole candidate. The paper can be
            read either way.
    """

    measure: Measure = "exact"
    paper: bool = False
    mean: int = 1
    weight: float = 0.3
    of_group: bool = False

    def score(self, scores: Scores) -> Float[np.ndarray, "P S"]:
        """The score of each sample that is reported."""
        return scores.exact if self.measure == "exact" else scores.tokens

    def __call__(
        self, candidates: Int[np.ndarray, "P L"], scores: Scores, group: range | None = None
    ) -> Float[np.ndarray, "P"]:
        """Fitness.

        Args:
            group: the numbers of a candidate that are searched now; None, all of them.
        """
        score = self.score(scores).mean(axis=1, dtype=np.float64)
        if self.paper:
            counted = candidates[:, group.start : group.stop] if group and self.of_group else candidates
            saved = np.array([cache_score(tuple(candidate.tolist()), self.mean) for candidate in counted])
            return score * (1 + self.weight * saved)
        # less than the least difference of two shares of right replies, so that it decides between equals only
        answers = 1 / (1 - scores.log_probability.mean(axis=1, dtype=np.float64))  # exp would make 0 of -100 and -200
        return score + answers / (2 * scores.exact.shape[1] if self.measure == "exact" else 1000)
