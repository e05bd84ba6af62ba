"""Formatting of scores and settings, the same in figures, in the terminal and in a notebook."""

from kvjax.search.outcome import SetScore
from kvjax.search.result import SearchResult


def measured(result: SearchResult) -> str:
    """The unit of a score."""
    return "exact replies" if result.config.measure == "exact" else "tokens of replies"


def setting(result: SearchResult) -> str:
    """'niah_single_2, vt at 1,024 tokens, 64 kept'."""
    config = result.config
    tasks = ", ".join(task.rpartition("/")[2] for task in config.tasks)
    return f"{tasks} at {config.length:,} tokens, {config.token_budget:,} kept"


def label(result: SearchResult) -> str:
    """The setting in two lines."""
    return setting(result).replace(" at ", "\nat ")


def cell(score: SetScore) -> tuple[str, str]:
    """A mean x100, and its interval: '86.3', '79.0 to 91.4'."""
    return f"{100 * score.mean:.1f}", f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def gained(gain: tuple[float, float, float]) -> tuple[str, str]:
    """A difference x100 with its sign, and its interval: '+8.6', '+3.1 to +14.1'."""
    mean, low, high = (100 * value + 0.0 for value in gain)
    return f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"
