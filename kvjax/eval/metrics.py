"""How a generated answer is scored, by the name a task gives: every score lies in [0, 1], more is better.

A metric takes the reply and all accepted answers. `string_match_all` wants each of them, `classification` the
first; every other metric takes the answer that the reply comes closest to.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kvjax.eval.metrics_benchmark import choice, classification, first_line, leading_number, number_share
from kvjax.eval.metrics_interval import mean_interval, wilson_interval
from kvjax.eval.metrics_text import code_line, last_number, squad_words, words

__all__ = [
    "METRICS",
    "Metric",
    "edit_similarity",
    "exact_match",
    "find_metric",
    "gsm8k",
    "mean_interval",
    "rouge_l",
    "score_turns",
    "string_match_all",
    "string_match_part",
    "token_f1",
    "wilson_interval",
]

Metric = Callable[[str, Sequence[str]], float]


def _given(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise ValueError("answers is empty: a sample has at least one")
    return answers


def _distance() -> Any:
    try:
        from rapidfuzz import distance
    except ImportError as error:
        raise ImportError('edit_similarity and rouge_l need rapidfuzz: pip install "kvjax[eval]"') from error
    return distance


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score: the share of the answers that the prediction holds, case ignored.

    Raises:
        ValueError: no answers.
    """
    text = prediction.lower()
    return sum(answer.lower() in text for answer in _given(answers)) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction holds any of the answers, case ignored, else 0.0.

    Raises:
        ValueError: no answers.
    """
    return float(string_match_all(prediction, answers) > 0)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers but for blanks and line ends (RepoBench's), else 0.0.

    Raises:
        ValueError: no answers.
    """
    return float(any(prediction.split() == answer.split() for answer in _given(answers)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall in words, normalised as SQuAD does, of the best answer.

    Two texts without a word are equal, a text with and one without share nothing.

    Raises:
        ValueError: no answers.
    """
    found = squad_words(prediction)

    def score(answer: str) -> float:
        wanted = squad_words(answer)
        if not wanted or not found:
            return float(wanted == found)
        return 2 * (wanted & found).total() / (wanted.total() + found.total())

    return max(map(score, _given(answers)))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L's F (beta 1) over lower-cased words of letters and digits, unstemmed, of the best answer.

    That is `rougeL` of Google's rouge-score. The longest common subsequence is of the whole texts, not of sentences.

    Raises:
        ValueError: no answers.
        ImportError: rapidfuzz is missing.
    """
    lcs, found = _distance().LCSseq, words(prediction)

    def score(answer: str) -> float:
        wanted = words(answer)
        if not wanted or not found:
            return 0.0
        return 2 * lcs.similarity(found, wanted) / (len(found) + len(wanted))

    return max(map(score, _given(answers)))


def edit_similarity(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of code: the indel similarity of the prediction's first line of code, of the best answer.

    Indel similarity is 1 - (insertions + deletions) / (both lengths), a replacement counting as one of each; it is
    not 1 - Levenshtein / (the longer length). The line is the first without a backtick, `#` or `//`, or nothing.

    Raises:
        ValueError: no answers.
        ImportError: rapidfuzz is missing.
    """
    indel, line = _distance().Indel, code_line(prediction)
    return max(indel.normalized_similarity(line, answer) for answer in _given(answers))


def gsm8k(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the last number of the prediction is the last of an answer, as a value: '$1,200.00' is '1200'.

    What comes after the line end before a further 'Question:' is not the answer any more, and left out.

    Raises:
        ValueError: no answers, or one without a number.
    """
    wanted = [last_number(answer) for answer in _given(answers)]
    if None in wanted:
        raise ValueError(f"an answer of {list(answers)} holds no number: GSM8K's score compares numbers")
    return float(last_number(prediction.split("\nQuestion:")[0]) in wanted)


METRICS: dict[str, Metric] = {
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "gsm8k": gsm8k,
    # of single data sets
    "first_line_token_f1": first_line(token_f1),
    "first_line_rouge_l": first_line(rouge_l),
    "classification": first_line(classification),
    "number_share": number_share,
    "leading_number": leading_number,
    "choice": choice,
}


def find_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        KeyError: there is none; the message lists all names.
    """
    if name not in METRICS:
        raise KeyError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]


def score_turns(metric: str, replies: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """A sample's score: the mean over its turns of the metric called `metric`.

    Raises:
        ValueError: there are not as many replies as turns, or none.
    """
    if not replies or len(replies) != len(answers):
        raise ValueError(f"{len(replies)} replies to {len(answers)} turns: one reply to each, and at least one")
    scores = [find_metric(metric)(reply, accepted) for reply, accepted in zip(replies, answers, strict=True)]
    return sum(scores) / len(scores)
