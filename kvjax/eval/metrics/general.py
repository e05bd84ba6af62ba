"""Metrics that several benchmarks share. Each score lies in [0, 1]; more is better."""

from collections.abc import Sequence
from typing import Any

from kvjax.eval.metrics.text import checked, code_line, last_number, squad_words, words


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
    return sum(answer.lower() in text for answer in checked(answers)) / len(answers)


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
    return float(any(prediction.split() == answer.split() for answer in checked(answers)))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall in words, normalised as SQuAD does, of the best answer.

    Two texts without a word are equal, a text with and one without share nothing.

    Raises:
        ValueError: no answers.
    """
    predicted = squad_words(prediction)

    def score(answer: str) -> float:
        accepted = squad_words(answer)
        if not accepted or not predicted:
            return float(accepted == predicted)
        return 2 * (accepted & predicted).total() / (accepted.total() + predicted.total())

    return max(map(score, checked(answers)))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L's F (beta 1) over lower-cased words of letters and digits, unstemmed, of the best answer.

    That is `rougeL` of Google's rouge-score. The longest common subsequence is of the whole texts, not of sentences.

    Raises:
        ValueError: no answers.
        ImportError: rapidfuzz is missing.
    """
    lcs, predicted = _distance().LCSseq, words(prediction)

    def score(answer: str) -> float:
        accepted = words(answer)
        if not accepted or not predicted:
            return 0.0
        return 2 * lcs.similarity(predicted, accepted) / (len(predicted) + len(accepted))

    return max(map(score, checked(answers)))


def edit_similarity(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of code: the indel similarity of the prediction's first line of code, of the best answer.

    Indel similarity is 1 - (insertions + deletions) / (both lengths), a replacement counting as one of each; it is
    not 1 - Levenshtein / (the longer length). The line is the first without a backtick, `#` or `//`, or nothing.

    Raises:
        ValueError: no answers.
        ImportError: rapidfuzz is missing.
    """
    indel, line = _distance().Indel, code_line(prediction)
    return max(indel.normalized_similarity(line, answer) for answer in checked(answers))


def gsm8k(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the last number of the prediction is the last of an answer, as a value: '$1,200.00' is '1200'.

    What comes after the line end before a further 'Question:' is not the answer any more, and left out.

    Raises:
        ValueError: no answers, or one without a number.
    """
    accepted = [last_number(answer) for answer in checked(answers)]
    if None in accepted:
        raise ValueError(f"an answer of {list(answers)} holds no number: GSM8K's score compares numbers")
    return float(last_number(prediction.split("\nQuestion:")[0]) in accepted)
