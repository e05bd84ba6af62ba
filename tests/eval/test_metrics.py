"""Scores against values worked out by hand, against the libraries that others use, and for any text."""

import builtins
import random
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz import fuzz
from rouge_score import rouge_scorer

from kvjax.eval.metrics import (
    METRICS,
    edit_similarity,
    exact_match,
    find_metric,
    gsm8k,
    rouge_l,
    score_turns,
    string_match_all,
    string_match_part,
    token_f1,
)
from kvjax.eval.metrics.text import code_line, last_number, squad_words

TEXT = st.text(alphabet=st.sampled_from("ab Z19.,-$#`/\n\"'äΣ中 the"), max_size=40)


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


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("  return x\n", ["return  x"], 1.0),
        ("return y", ["return x", "return y"], 1.0),
        ("Return x", ["return x"], 0.0),
        ("return x.", ["return x"], 0.0),
    ],
)
def test_exact_match_forgives_blanks_only(prediction, answers, score):
    assert exact_match(prediction, answers) == score


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0),
        # {cat, sat} and {cat, sat, on, mat}: precision 1, recall 1/2
        ("the cat sat", ["a cat sat on the mat"], 2 / 3),
        # counted as often as in both: precision 1/3, recall 1
        ("no no no", ["no"], 0.5),
        ("paris", ["london", "in paris"], 2 / 3),
        ("it's", ["its"], 1.0),
        ("dog", ["cat"], 0.0),
        ("the", ["a"], 1.0),  # nothing but articles is nothing, on both sides
        ("the", ["cat"], 0.0),
    ],
)
def test_token_f1(prediction, answers, score):
    assert token_f1(prediction, answers) == pytest.approx(score)


def test_squads_words_are_those_of_its_script():
    assert dict(squad_words("The theatre, an  A-team; THE end.")) == {"theatre": 1, "ateam": 1, "end": 1}


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        # longest common subsequence "police the gunman": 3 of 4 and 3 of 4
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        # "the gunman" of four and four
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("...", ["a"], 0.0),
        ("a", ["..."], 0.0),
        ("b c", ["x y", "a b c d"], 2 * 2 / (2 + 4)),
    ],
)
def test_rouge_l(prediction, answers, score):
    assert rouge_l(prediction, answers) == pytest.approx(score)


def test_rouge_l_is_that_of_googles_library():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    rng = random.Random(0)
    pool = ["the", "The", "cat,", "sat.", "on", "mat-rug", "42", "it's", "Café\nnaïve", "A", "_x_", ""]
    for _ in range(200):
        one, two = (" ".join(rng.choices(pool, k=rng.randrange(12))) for _ in range(2))
        assert rouge_l(one, [two]) == pytest.approx(scorer.score(two, one)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("return x", "return x", 1.0),
        # one deletion of 8 + 7 characters
        ("return x", "returnx", 1 - 1 / 15),
        # a replacement is a deletion and an insertion: 1 - 2 / 6; Levenshtein's would be 1 - 1 / 3
        ("abc", "abd", 1 - 2 / 6),
        ("# a comment\n```python\n// more\nreturn x\nreturn y", "return x", 1.0),
        ("\n\nreturn x", "return x", 1.0),
        ("# nothing but a comment", "return x", 0.0),
        ("    return x", "return x", 1 - 4 / 20),  # blanks count
    ],
)
def test_edit_similarity(prediction, answer, score):
    assert edit_similarity(prediction, [answer]) == pytest.approx(score)


@settings(max_examples=100, deadline=None)
@given(TEXT, TEXT)
def test_edit_similarity_is_the_ratio_that_longbench_takes(prediction, answer):
    line = code_line(prediction)
    # the library calls two empty texts different, 0 of 0; nothing was lost, so that is 1
    ratio = fuzz.ratio(line, answer) / 100 if line or answer else 1.0
    assert edit_similarity(prediction, [answer]) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 5 + 7 = 12 eggs.", "12"),
        ("#### 1,234", "1234"),
        ("It costs $1,200.50.", "1200.5"),
        ("10-5", "5"),
        ("It is -3 degrees", "-3"),
        ("so x=-3", "-3"),
        (".5 of it", "0.5"),
        ("1. one 2. two", "2"),
        ("none", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("5 + 7 = 12.\n#### 12", ["Natalia sold 5 and 7.\n#### 12"], 1.0),
        ("The answer is $1,200.00.", ["#### 1200"], 1.0),
        ("12 of 13", ["12"], 0.0),
        ("twelve", ["12"], 0.0),
        # a base model goes on and asks itself the next question
        ("#### 12\n\nQuestion: What is 3 + 4?\nAnswer: 7", ["12"], 1.0),
    ],
)
def test_gsm8k(prediction, answers, score):
    assert gsm8k(prediction, answers) == score


def test_gsm8k_wants_answers_with_numbers():
    with pytest.raises(ValueError, match="holds no number"):
        gsm8k("12", ["twelve"])


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=60, deadline=None)
@given(prediction=TEXT, answers=st.lists(TEXT, min_size=1, max_size=3))
def test_any_score_lies_between_0_and_1(name, prediction, answers):
    answers = [answer + "7" for answer in answers]  # a number for those who want one
    assert 0.0 <= METRICS[name](prediction, answers) <= 1.0


@pytest.mark.parametrize("name", METRICS)
def test_no_answers_are_an_error(name):
    with pytest.raises(ValueError, match="at least one"):
        METRICS[name]("a", [])


def test_an_unknown_metric_is_named_with_all_that_exist():
    with pytest.raises(KeyError, match="no metric 'bleu'; there are string_match_all"):
        find_metric("bleu")


def test_turns_count_alike():
    assert score_turns("string_match_all", [" 12.", " 3.", " 5."], [["12"], ["4"], ["5"]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 replies to 2 turns"):
        score_turns("string_match_all", ["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 replies to 0 turns"):
        score_turns("string_match_all", [], [])


@pytest.mark.parametrize("name", ["rouge_l", "edit_similarity"])
def test_a_missing_library_is_named_with_what_installs_it(name, monkeypatch):
    real = builtins.__import__

    def without(module, *rest):
        if module.split(".")[0] == "rapidfuzz":
            raise ImportError(module)
        return real(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "kvjax\[eval\]"'):
        METRICS[name]("a", ["a"])
