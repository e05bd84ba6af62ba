"""Metrics: the scores of replies against accepted answers, their means and confidence intervals."""

from kvjax.eval.metrics.general import (
    edit_similarity,
    exact_match,
    gsm8k,
    rouge_l,
    string_match_all,
    string_match_part,
    token_f1,
)
from kvjax.eval.metrics.interval import mean_interval, wilson_interval
from kvjax.eval.metrics.registry import METRICS, Metric, find_metric, score_turns

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
