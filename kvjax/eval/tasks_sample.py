"""What a task hands to whoever scores a model: a long context, a question about it, the accepted answers."""

from collections.abc import Callable
from dataclasses import dataclass

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """A question about some context.

    Attributes:
        question: ends in a line end.
        answer_prefix: the start of the answer, given to a completing model; no blank at its end.
        answers: strings that a right reply holds, in the order of a perfect reply.
        reply: the perfect continuation of `answer_prefix`.
    """

    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    reply: str


@dataclass(frozen=True)
class Sample:
    """One generated test case; the schema is kvpress's, so its tables can be compared with.

    Attributes:
        context: the text that a compressor sees; ends in a line end.
        question, answer_prefix, answers: as in `Question`.
        max_new_tokens: tokens that each answer may take.
        later: questions asked after the first on the same context, each after the former is answered.
        reply: the perfect continuation of the first `answer_prefix`; empty where only the answers are known.
    """

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    later: tuple[Question, ...] = ()
    reply: str = ""

    @property
    def turns(self) -> tuple[Question, ...]:
        """All questions in the order of asking; a sample's score is the mean of its turns' scores."""
        return (Question(self.question, self.answer_prefix, self.answers, self.reply), *self.later)

    @property
    def prompt(self) -> str:
        """What a completing model continues in the first turn."""
        return self.context + self.question + self.answer_prefix

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a chat model answers in the first turn: the same, without the answer's beginning."""
        return [{"role": "user", "content": (self.context + self.question).rstrip("\n")}]


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
