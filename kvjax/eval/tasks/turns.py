"""Several questions on one context, each asked after the former was answered (the shape of SCBench).

A method that evicts tokens by the first question may have evicted the answer to the second.
"""

import json
from dataclasses import dataclass

from kvjax.eval.tasks.fitting import dialogue_text, fit_sample, interleave
from kvjax.eval.tasks.needle import NeedleTask
from kvjax.eval.tasks.sample import CountTokens, Question, Sample
from kvjax.eval.tasks.surface import MINI, RULER
from kvjax.eval.tasks.task import GeneratedTask


@dataclass(frozen=True)
class NeedleTurnsTask(GeneratedTask):
    """All keys of a needle task, asked one after the other in an order of their own."""

    name: str
    needle: NeedleTask

    def __post_init__(self) -> None:
        if self.needle.keys < 2:
            raise ValueError(f"keys must be at least 2 to be asked in turns, got {self.needle.keys}")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        facts = self.needle.draw_facts(rng)
        order = rng.sample(list(facts), len(facts))
        surface = self.needle.surface
        questions = [surface.ask({key: facts[key]}, self.needle.value) for key in order]
        context = self.needle.hide(facts, length - count(dialogue_text(questions)), rng, count)
        return Sample.of(context, questions, surface.niah_max_new_tokens)


@dataclass(frozen=True)
class JsonTurnsTask(GeneratedTask):
    """SCBench's key-value retrieval: a JSON object of random ids, and `turns` of its keys asked for in turn."""

    name: str
    turns: int = 5
    max_new_tokens: int = 80

    def __post_init__(self) -> None:
        if self.turns < 2:
            raise ValueError(f"turns must be at least 2, got {self.turns}")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        pairs = [(RULER.draw("id", rng), RULER.draw("id", rng)) for _ in range(self.turns + length // 16)]
        queried, others = pairs[: self.turns], pairs[self.turns :]
        placed = [(rng.random(), pair) for pair in queried]

        def context(size: int) -> str:
            text = json.dumps(dict(interleave(others[:size], placed)))
            return f"Extract the value corresponding to the specified key in the JSON object below.\n\n{text}\n\n"

        return fit_sample(
            context,
            [self._ask(key, value) for key, value in queried],
            max_new_tokens=self.max_new_tokens,
            length=length,
            upper=len(others),
            count=count,
        )

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
