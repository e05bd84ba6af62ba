"""Scores against values worked out by hand."""

import pytest

from kvjax.eval.metrics import string_match_all, string_match_part, wilson_interval


@pytest.mark.parametrize(
    ("prediction", "answers", "every", "some"),
    [
        (" 4719.", ["4719"], 1.0, 1.0),
        (" 471 9.", ["4719"], 0.0, 0.0),
        (" Apple, TIGER", ["apple", "tiger", "moon", "owl"], 0.5, 1.0),
        ("", ["a"], 0.0, 0.0),
    ],
)
def test_string_match(prediction, answers, every, some):
    assert string_match_all(prediction, answers) == every
    assert string_match_part(prediction, answers) == some


def test_no_answers_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        string_match_all("a", [])


def test_wilson_interval_of_known_cases():
    # 0 of 10 and 10 of 10: Wilson's bound is z^2 / (n + z^2) away from the end
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.72246, 1.0), abs=1e-4)
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0.5, 0)
