"""Scores of single data sets, against values worked out by hand from the benchmarks' own rules."""

import pytest

from kvjax.eval.metrics import METRICS

CLASSES = ["Food", "Animal", "Other food", "Date"]


@pytest.mark.parametrize(
    ("prediction", "right", "score"),
    [
        ("Type: Food\nQuestion: more", "Food", 1.0),
        ("Food or Animal", "Food", 0.5),
        ("Animal", "Food", 0.0),
        ("", "Food", 0.0),
        ("Food or Date\nAnimal", "Date", 0.5),  # the first line only
    ],
)
def test_classification(prediction, right, score):
    assert METRICS["classification"](prediction, [right, *CLASSES]) == score


def test_a_class_within_the_right_one_was_not_named():
    assert METRICS["classification"]("It is Other food", ["Other food", "food", "Other", "Date"]) == 1.0
    assert METRICS["classification"]("It is Other food", ["food", "food", "Other food"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Paragraph 12", "Paragraph 12", 1.0),
        ("Paragraph 12 or 13", "Paragraph 12", 0.5),
        ("3, 3, 4", "3", 2 / 3),
        ("none", "3", 0.0),
    ],
)
def test_number_share(prediction, answer, score):
    assert METRICS["number_share"](prediction, [answer]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [(" 42. Or 7?", "42", 1.0), ("7, not 42", "42", 0.0), ("42.0", "42", 1.0), ("forty-two", "42", 0.0)],
)
def test_leading_number(prediction, answer, score):
    assert METRICS["leading_number"](prediction, [answer]) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" B. The moon", 1.0), ("B", 1.0), ("the answer is B", 1.0), ("C, not B", 0.0), ("Because", 0.0), ("", 0.0)],
)
def test_choice(prediction, score):
    assert METRICS["choice"](prediction, ["B"]) == score


@pytest.mark.parametrize("name", ["token_f1", "rouge_l"])
def test_only_the_first_line_counts_where_examples_would_follow(name):
    assert METRICS[f"first_line_{name}"]("\nthe moon\nQuestion: and the sun", ["moon", "the moon"]) == 1.0
    assert METRICS[name]("\nthe moon\nQuestion: and the sun", ["moon", "the moon"]) < 1.0


@pytest.mark.parametrize("name", ["number_share", "leading_number"])
def test_answers_without_a_number_are_an_error(name):
    with pytest.raises(ValueError, match="holds no number"):
        METRICS[name]("3", ["three"])
