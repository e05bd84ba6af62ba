"""Several questions on one context, each asked after the former was answered (the shape of SCBench).

Whoever throws tokens away for the first question may have thrown away what the second one asks for.
"""

import json
import random
from dataclasses import dataclass

from kvjax.eval.tasks_needle import NeedleTask
from kvjax.eval.tasks_sample import CountTokens, Question, Sample, largest_fit
from kvjax.eval.tasks_surface import MINI, RULER


def turns_sample(context: str, questions: list[Question], max_new_tokens: int) -> Sample:
    """A sample that asks `questions` in their order."""
    first = questions[0]
    return Sample(
        context,
        first.question,
        first.answer_prefix,
        first.answers,
        max_new_tokens,
        later=tuple(questions[1:]),
        reply=first.reply,
    )


def said(questions: list[Question]) -> str:
    """All turns with their perfect replies, each closed with a line end: what they add to the context's length."""
    return "".join(turn.question + turn.answer_prefix + turn.reply + "\n" for turn in questions)


@dataclass(frozen=True)
class NeedleTurnsTask:
    """All keys of a needle task, asked one after the other in an order of their own."""

    name: str
    needle: NeedleTask

    def __post_init__(self) -> None:
        if self.needle.keys < 2:
            raise ValueError(f"keys must be at least 2 to be asked in turns, got {self.needle.keys}")

    @property
    def metric(self) -> str:
        """A key of `METRICS`."""
        return self.needle.metric

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case whose context, questions and answers take at most `length` tokens, and nearly that.

        Raises:
            ValueError: `length` does not even hold the planted facts and the questions.
        """
        rng = random.Random(f"{self.name}/{length}/{seed}")
        facts = self.needle.draw_facts(rng)
        order = rng.sample(list(facts), len(facts))
        surface = self.needle.surface
        questions = [surface.ask({key: facts[key]}, self.needle.value) for key in order]
        haystack = self.needle.hide(facts, length - count(said(questions)), rng, count)
        return turns_sample(haystack.context, questions, surface.niah_max_new_tokens)


@dataclass(frozen=True)
class JsonTurnsTask:
    """SCBench's key-value retrieval: a JSON object of random ids, and `turns` of its keys asked for in turn."""

    name: str
    turns: int = 5
    max_new_tokens: int = 80

    def __post_init__(self) -> None:
        if self.turns < 2:
            raise ValueError(f"turns must be at least 2, got {self.turns}")

    @property
    def metric(self) -> str:
        """A key of `METRICS`."""
        return "string_match_all"

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case whose context, questions and answers take at most `length` tokens, and nearly that.

        Raises:
            ValueError: `length` does not even hold the pairs asked for and the questions.
        """
        rng = random.Random(f"{self.name}/{length}/{seed}")
        pairs = [(RULER.draw("id", rng), RULER.draw("id", rng)) for _ in range(self.turns + length // 16)]
        asked, others = pairs[: self.turns], pairs[self.turns :]
        places = [rng.random() for _ in asked]
        questions = [self._ask(key, value) for key, value in asked]

        def context(size: int) -> str:
            placed = [((i + 0.5) / max(size, 1), pair) for i, pair in enumerate(others[:size])]
            ordered = sorted([*placed, *zip(places, asked, strict=True)], key=lambda item: item[0])
            told = json.dumps(dict(pair for _, pair in ordered))
            return f"Extract the value corresponding to the specified key in the JSON object below.\n\n{told}\n\n"

        room = length - count(said(questions))
        size = largest_fit(lambda size: count(context(size)) <= room, upper=len(others))
        return turns_sample(context(size), questions, self.max_new_tokens)

    def _ask(self, key: str, value: str) -> Question:
        return Question(f'Key: "{key}"\n', "The value associated with the specified key is:", (value,), f' "{value}".')


def turns_tasks() -> tuple[NeedleTurnsTask | JsonTurnsTask, ...]:
    """Needles in text, and pairs among nothing but pairs; five turns each."""
    return (
        NeedleTurnsTask("text/turns_niah", NeedleTask("text/turns_niah", RULER, "text", keys=5)),
        JsonTurnsTask("text/turns_kv"),
        NeedleTurnsTask("mini/turns_niah", NeedleTask("mini/turns_niah", MINI, "text", keys=5)),
        NeedleTurnsTask("mini/turns_kv", NeedleTask("mini/turns_kv", MINI, "needles", keys=5)),
    )
