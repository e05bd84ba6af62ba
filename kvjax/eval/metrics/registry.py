"""Metrics by name. Each score lies in [0, 1]; more is better.

A metric takes the reply and all accepted answers. `string_match_all` scores the share of them that the reply holds,
`classification` compares with the first; every other metric takes the answer that the reply comes closest to.
"""

from collections.abc import Callable, Sequence

from kvjax.eval.metrics.benchmark import choice, classification, first_line, leading_number, number_share
from kvjax.eval.metrics.general import (
    edit_similarity,
    exact_match,
    gsm8k,
    rouge_l,
    string_match_all,
    string_match_part,
    token_f1,
)

Metric = Callable[[str, Sequence[str]], float]

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
