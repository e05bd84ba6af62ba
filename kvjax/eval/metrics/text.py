"""Texts as metrics compare them: words, the first line of code, the first and the last number."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A minus is a sign unless it stands between two numbers; thousands are set off by commas.
_NUMBER = re.compile(r"(?:(?<![\d.])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def checked(answers: Sequence[str]) -> Sequence[str]:
    """`answers`. Raises ValueError if there are none."""
    if not answers:
        raise ValueError("answers is empty: a sample has at least one")
    return answers


def squad_words(text: str) -> Counter[str]:
    """The words that SQuAD's script counts: lower case, without punctuation and the articles a, an, the."""
    plain = text.lower().translate(_PUNCTUATION)
    return Counter(_ARTICLES.sub(" ", plain).split())


def words(text: str) -> list[str]:
    """The words that rouge-score compares: lower-cased runs of a to z and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def code_line(text: str) -> str:
    """The first line that holds no backtick, `#` or `//`, leading line ends aside; empty if each does."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def last_number(text: str) -> Decimal | None:
    """The value of the last number in a text, if there is one."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def first_number(text: str) -> Decimal | None:
    """The value of the first number in a text, if there is one."""
    number = _NUMBER.search(text)
    return Decimal(number.group().replace(",", "")) if number else None
