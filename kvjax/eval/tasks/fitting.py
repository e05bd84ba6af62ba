"""Contexts fitted to a length: as much filler around a task's own sentences as a number of tokens allows."""

from collections.abc import Callable, Iterable, Sequence

from kvjax.eval.tasks.sample import CountTokens, Question, Sample


def fit_sample(
    context: Callable[[int], str],
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    length: int,
    upper: int,
    count: CountTokens,
) -> Sample:
    """The sample of the largest `context(n)`, n in [0, upper], that takes at most `length` tokens with all replies.

    Raises:
        ValueError: not even `context(0)` fits.
    """
    room = length - count(dialogue_text(questions))
    size = largest_fit(lambda size: count(context(size)) <= room, upper=upper)
    return Sample.of(context(size), questions, max_new_tokens)


def largest_fit(fits: Callable[[int], bool], *, upper: int) -> int:
    """The largest n in [0, upper] for which `fits(n)`, by bisection; `fits` is true up to some n, then false.

    Raises:
        ValueError: not even 0 fits.
    """
    if not fits(0):
        raise ValueError("the task's own sentences do not fit: ask for a greater length or fewer needles")
    low = 0
    while low < upper:
        middle = (low + upper + 1) // 2
        low, upper = (middle, upper) if fits(middle) else (low, middle - 1)
    return low


def dialogue_text(questions: Sequence[Question]) -> str:
    """All questions with their perfect replies; a line end closes each reply where there are several."""
    end = "\n" if len(questions) > 1 else ""
    return "".join(turn.question + turn.answer_prefix + turn.reply + end for turn in questions)


def interleave[Item](filler: Sequence[Item], placed: Iterable[tuple[float, Item]]) -> list[Item]:
    """`filler` spread evenly over the depths 0 to 1, with the items of `placed` at depths of their own."""
    spread = [((index + 0.5) / len(filler), item) for index, item in enumerate(filler)]
    return [item for _, item in sorted([*spread, *placed], key=lambda pair: pair[0])]
