"""Samples: a long context, the questions about it, and the accepted answers."""

from collections.abc import Callable, Sequence
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

    @classmethod
    def of(cls, context: str, questions: Sequence[Question], max_new_tokens: int) -> "Sample":
        """The sample that asks `questions`, at least one, in their order."""
        first, *later = questions
        return cls(
            context,
            first.question,
            first.answer_prefix,
            first.answers,
            max_new_tokens,
            later=tuple(later),
            reply=first.reply,
        )

    @property
    def turns(self) -> tuple[Question, ...]:
        """All questions in the order of asking; a sample's score is the mean of its turns' scores."""
        return (Question(self.question, self.answer_prefix, self.answers, self.reply), *self.later)

    @property
    def prompt(self) -> str:
        """The text that a completing model continues in the first turn."""
        return self.context + self.question + self.answer_prefix

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages that a chat model answers in the first turn: the same, without the answer's beginning."""
        return [{"role": "user", "content": (self.context + self.question).rstrip("\n")}]
