"""Scores that single data sets of LongBench and SCBench define for themselves."""

import re
from collections.abc import Callable, Sequence

from kvjax.eval.metrics.text import checked, first_number

_LETTER = re.compile(r"\b([A-D])\b")


def first_line(metric: Callable[[str, Sequence[str]], float]) -> Callable[[str, Sequence[str]], float]:
    """`metric` of the prediction's first line: what LongBench does where the context is a list of examples."""

    def scored(prediction: str, answers: Sequence[str]) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], answers)

    return scored


def classification(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of classes: one over the number of classes named, if the right one is among them.

    `answers` is the right class and after it all classes. A class whose name is part of the right one's name does
    not count as named. LongBench's script skips every second of those by an oversight.

    Raises:
        ValueError: no answers.
    """
    right = checked(answers)[0]
    named = {name for name in answers if name in prediction and (name == right or name not in right)}
    return 1 / len(named) if right in named else 0.0


def number_share(prediction: str, answers: Sequence[str]) -> float:
    """LongBench's score of counts and of paragraphs: the share of the prediction's numbers that are the answer's.

    Raises:
        ValueError: no answers, or one without a number.
    """
    numbers = [match.group() for answer in checked(answers) if (match := re.search(r"\d+", answer))]
    predicted = re.findall(r"\d+", prediction)
    if len(numbers) < len(answers):
        raise ValueError(f"an answer of {list(answers)} holds no number: this score compares numbers")
    return max(predicted.count(number) for number in numbers) / len(predicted) if predicted else 0.0


def leading_number(prediction: str, answers: Sequence[str]) -> float:
    """SCBench's score of passkeys and of statistics: 1.0 if the prediction's first number is an answer's, as a value.

    Raises:
        ValueError: no answers, or one without a number.
    """
    accepted = [first_number(answer) for answer in checked(answers)]
    if None in accepted:
        raise ValueError(f"an answer of {list(answers)} holds no number: this score compares numbers")
    return float(first_number(prediction) in accepted)


def choice(prediction: str, answers: Sequence[str]) -> float:
    """SCBench's score of multiple choice: 1.0 if the first letter from A to D that stands alone is an answer.

    Raises:
        ValueError: no answers.
    """
    accepted, letter = checked(answers), _LETTER.search(prediction)
    return float(letter is not None and letter.group() in accepted)
