"""Counting over the whole context: the most frequent words of a long list.

Nothing in the text marks the words asked for, so no query-agnostic method can know which tokens to retain.
"""

import math
import random
import string
from dataclasses import dataclass
from typing import Literal

from kvjax.eval.tasks.fitting import dialogue_text, fit_sample
from kvjax.eval.tasks.sample import CountTokens, Question, Sample
from kvjax.eval.tasks.task import GeneratedTask
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS, VERBS

Words = Literal["plain", "nouns", "coded"]


@dataclass(frozen=True)
class CountingWords:
    """The wording of a counting task.

    Attributes:
        before, question, answer_prefix: the context's beginning and what is asked, as in `Sample`.
        words: 'plain' English, 'nouns' (one token each in the model that ships), 'coded' (six random letters).
        numbered: write '1. apple 2. bear' instead of 'apple bear', in the reply too.
    """

    before: str
    question: str
    answer_prefix: str
    words: Words
    numbered: bool

    def text(self, words: list[str]) -> str:
        """The list as it stands in the context."""
        return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)) if self.numbered else " ".join(words)

    def ask(self, answers: list[str]) -> Question:
        """The question for `answers`."""
        reply = f" {self.text(answers)}" if self.numbered else f" {', '.join(answers)}."
        return Question(self.question, self.answer_prefix, tuple(answers), reply)

    def draw(self, count: int, rng: random.Random) -> list[str]:
        """Distinct words in random order: `count` of them, or all there are."""
        if self.words == "nouns":
            return rng.sample(NOUNS, min(count, len(NOUNS)))
        if self.words == "plain":
            pool = (*NOUNS, *ADJECTIVES, *VERBS)
            if count > len(pool):  # single words do not last
                pool = tuple(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)
            return rng.sample(pool, min(count, len(pool)))
        coded: dict[str, None] = {}
        while len(coded) < count:
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        return list(coded)


RULER_COMMON = CountingWords(
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "Question: What are the 10 most common words in the above list?\n",
    "Answer: The top 10 words that appear most often in the list are:",
    words="plain",
    numbered=True,
)
RULER_FREQUENT = CountingWords(
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. ",
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?\n",
    "Answer: According to the coded text above, the three most frequently appeared words are:",
    words="coded",
    numbered=False,
)
MINI_COMMON = CountingWords(
    "", "What are the 10 most common words?\n", "The most common words are:", words="nouns", numbered=False
)
MINI_FREQUENT = CountingWords(
    "", "What are the 3 most common words?\n", "The most common words are:", words="nouns", numbered=False
)


@dataclass(frozen=True)
class CommonWordsTask(GeneratedTask):
    """RULER's common words: 10 words appear 30 times each, all others 3 times, in random order.

    As in RULER the counts are 6 and 1 below `short` tokens. Where the supply of words does not fill the length, all
    counts are multiplied by the same whole number.
    """

    name: str
    wording: CountingWords
    short: int
    max_new_tokens: int
    common: int = 10

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        often, seldom = (6, 1) if length < self.short else (30, 3)
        entry = 3 if self.wording.numbered else 1  # tokens of one word in the list, at least
        words = self.wording.draw(self.common + length // (seldom * entry), rng)
        answers, others = words[: self.common], words[self.common :]
        questions = [self.wording.ask(answers)]
        room = length - count(dialogue_text(questions))

        def context(size: int, times: int) -> str:
            listed = answers * (often * times) + others[:size] * (seldom * times)
            random.Random(f"{self.name}/{length}/{seed}/{size}").shuffle(listed)
            return f"{self.wording.before}{self.wording.text(listed)}\n"

        times = 1
        while count(context(len(others), times)) <= room:
            times += 1
        return fit_sample(
            lambda size: context(size, times),
            questions,
            max_new_tokens=self.max_new_tokens,
            length=length,
            upper=len(others),
            count=count,
        )


@dataclass(frozen=True)
class FrequentWordsTask(GeneratedTask):
    """RULER's frequent words: the word of rank k appears in proportion to k^-2; which are ranks 2, 3 and 4?

    Rank 1 is '...', which the question says to ignore. Counts are those of a zeta distribution, rounded down.
    """

    name: str
    wording: CountingWords
    max_new_tokens: int
    # With fewer, ranks 4 and 5 would be hard to tell apart: 100 words give the counts 60, 15, 6, 3, 2, 1, 1.
    least: int = 100

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        ranked = ["...", *self.wording.draw(max(math.isqrt(length), 10), rng)]

        def context(extra: int) -> str:
            size = self.least + extra
            listed = [word for word, times in zip(ranked, self.counts(size), strict=False) for _ in range(times)]
            random.Random(f"{self.name}/{length}/{seed}/{size}").shuffle(listed)
            return f"{self.wording.before}{self.wording.text(listed)}\n"

        return fit_sample(
            context,
            [self.wording.ask(ranked[1:4])],
            max_new_tokens=self.max_new_tokens,
            length=length,
            upper=2 * length,
            count=count,
        )

    def counts(self, size: int) -> list[int]:
        """How often the words of rank 1, 2, ... appear in a text of about `size` words."""
        zeta = math.pi**2 / 6
        return [int(size / rank**2 / zeta) for rank in range(1, math.isqrt(int(size / zeta)) + 1)]


def counting_tasks() -> tuple[CommonWordsTask | FrequentWordsTask, ...]:
    """Common and frequent words in RULER's strings and in short ones."""
    return (
        CommonWordsTask("ruler/cwe", RULER_COMMON, short=4096, max_new_tokens=120),
        FrequentWordsTask("ruler/fwe", RULER_FREQUENT, max_new_tokens=50),
        CommonWordsTask("mini/cwe", MINI_COMMON, short=512, max_new_tokens=32),
        FrequentWordsTask("mini/fwe", MINI_FREQUENT, max_new_tokens=12),
    )
