"""Counting over the whole context: which words of a long list appear most often?

Nothing in the text says that a word is asked for, so no selection made before the question can know what to keep.
"""

import math
import random
import string
from dataclasses import dataclass
from typing import Literal

from kvjax.eval.tasks_sample import CountTokens, Sample, largest_fit
from kvjax.eval.tasks_words import ADJECTIVES, NOUNS, VERBS

Words = Literal["plain", "nouns", "coded"]


@dataclass(frozen=True)
class CountingWords:
    """How a counting task is worded.

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

    def reply(self, answers: list[str]) -> str:
        """The perfect reply."""
        return f" {self.text(answers)}" if self.numbered else f" {', '.join(answers)}."

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
class CommonWordsTask:
    """RULER's common words: 10 words appear 30 times each, all others 3 times, in random order.

    As in RULER the counts are 6 and 1 below `short` tokens. Where the supply of words does not fill the length, all
    counts are multiplied by the same whole number.
    """

    name: str
    wording: CountingWords
    short: int
    max_new_tokens: int
    common: int = 10

    @property
    def metric(self) -> str:
        """A key of `METRICS`."""
        return "string_match_all"

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case whose prompt and answer take at most `length` tokens, and nearly that.

        Raises:
            ValueError: `length` does not hold the common words.
        """
        rng = random.Random(f"{self.name}/{length}/{seed}")
        often, seldom = (6, 1) if length < self.short else (30, 3)
        entry = 3 if self.wording.numbered else 1  # tokens of one word in the list, at least
        words = self.wording.draw(self.common + length // (seldom * entry), rng)
        answers, others = words[: self.common], words[self.common :]
        reply = self.wording.reply(answers)
        room = length - count(self.wording.question + self.wording.answer_prefix + reply)

        def context(size: int, times: int) -> str:
            listed = answers * (often * times) + others[:size] * (seldom * times)
            random.Random(f"{self.name}/{length}/{seed}/{size}").shuffle(listed)
            return f"{self.wording.before}{self.wording.text(listed)}\n"

        times = 1
        while count(context(len(others), times)) <= room:
            times += 1
        size = largest_fit(lambda size: count(context(size, times)) <= room, upper=len(others))
        return Sample(
            context(size, times),
            self.wording.question,
            self.wording.answer_prefix,
            tuple(answers),
            self.max_new_tokens,
            reply=reply,
        )


@dataclass(frozen=True)
class FrequentWordsTask:
    """RULER's frequent words: the word of rank k appears in proportion to k^-2; which are ranks 2, 3 and 4?

    Rank 1 is '...', which the question says to ignore. Counts are those of a zeta distribution, rounded down.
    """

    name: str
    wording: CountingWords
    max_new_tokens: int
    # With fewer, ranks 4 and 5 would be hard to tell apart: 100 words give the counts 60, 15, 6, 3, 2, 1, 1.
    least: int = 100

    @property
    def metric(self) -> str:
        """A key of `METRICS`."""
        return "string_match_all"

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case whose prompt and answer take at most `length` tokens, and nearly that.

        Raises:
            ValueError: `length` does not hold `least` words.
        """
        rng = random.Random(f"{self.name}/{length}/{seed}")
        ranked = ["...", *self.wording.draw(max(math.isqrt(length), 10), rng)]
        answers = ranked[1:4]
        reply = self.wording.reply(answers)
        room = length - count(self.wording.question + self.wording.answer_prefix + reply)

        def context(size: int) -> str:
            listed = [word for word, times in zip(ranked, self.counts(size), strict=False) for _ in range(times)]
            random.Random(f"{self.name}/{length}/{seed}/{size}").shuffle(listed)
            return f"{self.wording.before}{self.wording.text(listed)}\n"

        size = largest_fit(lambda size: count(context(self.least + size)) <= room, upper=2 * length)
        return Sample(
            context(self.least + size),
            self.wording.question,
            self.wording.answer_prefix,
            tuple(answers),
            self.max_new_tokens,
            reply=reply,
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
