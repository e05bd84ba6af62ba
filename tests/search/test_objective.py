"""What a candidate is worth: in the paper's terms, and in ours, where answers' probability decides between equals."""

import numpy as np
import pytest

from kvjax.search.evaluators.scores import Scores
from kvjax.search.objective import Objective

SCHEMES = np.array([[100, 100], [120, 100], [100, 80]])


def scores(exact: list[list[int]], log_probability: list[list[float]]) -> Scores:
    right = np.array(exact, np.float32)
    return Scores(right, right / 2 + 0.5, np.array(log_probability, np.float32))


def test_the_papers_objective_weighs_the_score_with_what_it_costs():
    found = scores([[1, 1, 0, 0]] * 3, [[-1.0] * 4] * 3)
    fitness = Objective(paper=True, mean=100)(SCHEMES, found)
    # CacheScores of 1, 1 - 0.1 and 1 - 0.2 * 0.1
    assert fitness == pytest.approx([0.5 * 1.3, 0.5 * 1.27, 0.5 * 1.294])
    assert Objective("tokens", paper=True, mean=100, weight=0.0)(SCHEMES, found) == pytest.approx([0.75] * 3)


def test_the_papers_cost_is_of_the_scheme_or_of_the_group_that_is_searched():
    found = scores([[1, 1, 0, 0]] * 3, [[-1.0] * 4] * 3)
    second = range(1, 2)
    whole = Objective(paper=True, mean=100)(SCHEMES, found, second)
    assert whole == pytest.approx([0.5 * 1.3, 0.5 * 1.27, 0.5 * 1.294])
    # of [100, 100, 80]: CacheScores of 1, 1 and 1 - 0.2 * 0.2
    part = Objective(paper=True, mean=100, of_group=True)(SCHEMES, found, second)
    assert part == pytest.approx([0.5 * 1.3, 0.5 * 1.3, 0.5 * 1.288])


def test_of_equal_scores_the_more_probable_answers_are_worth_more():
    found = scores([[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], [[-2.0] * 4, [-1.0] * 4, [-3.0] * 4])
    assert np.argsort(-Objective()(SCHEMES, found)).tolist() == [1, 0, 2]


def test_one_more_right_reply_is_worth_more_than_any_probability():
    found = scores([[0] * 50, [1] + [0] * 49, [1, 1] + [0] * 48], [[0.0] * 50, [-60.0] * 50, [-60.0] * 50])
    fitness = Objective()(SCHEMES, found)
    assert np.all(np.diff(fitness) > 0)
    assert np.floor(fitness * 50).tolist() == [0, 1, 2]  # of 50, still to be read off


@pytest.mark.parametrize("measure", ["exact", "tokens"])
def test_improbable_answers_differ_still(measure):
    """A model that is sure of something else gives the right answer a logarithm of -100 or less."""
    found = scores([[1, 1, 0, 0]] * 3, [[-150.0] * 4, [-149.0] * 4, [-900.0] * 4])
    fitness = Objective(measure)(SCHEMES, found)
    assert np.argsort(-fitness).tolist() == [1, 0, 2]
    assert np.ptp(fitness) > 1e-6
