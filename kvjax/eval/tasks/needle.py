"""Needles in a haystack: facts hidden in filler, then a question about some of them.

One class makes RULER's eight tasks, which differ in the filler, the kinds of keys and values, and their numbers.
"""

import random
from dataclasses import dataclass
from typing import Literal

from kvjax.eval.tasks.fitting import dialogue_text, interleave, largest_fit
from kvjax.eval.tasks.sample import CountTokens, Sample
from kvjax.eval.tasks.surface import Kind, Surface
from kvjax.eval.tasks.task import GeneratedTask
from kvjax.eval.tasks.words import NOUNS, noise, sentences


@dataclass(frozen=True)
class NeedleTask(GeneratedTask):
    """A needle task of any length.

    Attributes:
        surface: how sentences are worded.
        filler: 'noise' (five sentences over and over), 'text' (random English) or 'needles' (other facts).
        key, value: kinds of the keys and of the values.
        keys, values, queries: facts planted, values of the asked key, keys asked for.
        edges: of all needles, the share that stands at the very start, and the share at the very end: uniform depths
            hardly ever put one there, so a model that learns from them alone fails on the first and the last sentence.
    """

    name: str
    surface: Surface
    filler: Literal["noise", "text", "needles"] = "noise"
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    edges: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.edges < 0.5:
            raise ValueError(f"edges must be a share in [0, 0.5), got {self.edges}")
        if not 1 <= self.queries <= self.keys:
            raise ValueError(f"queries must be 1..keys={self.keys}, got {self.queries}")
        if self.values < 1 or (self.values > 1 and self.keys > 1):
            raise ValueError(f"{self.values} values of {self.keys} keys: several values take exactly one key")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        facts = self.draw_facts(rng)
        queried = {key: facts[key] for key in rng.sample(list(facts), self.queries)}
        questions = [self.surface.ask(queried, self.value)]
        context = self.hide(facts, length - count(dialogue_text(questions)), rng, count)
        return Sample.of(context, questions, self.surface.niah_max_new_tokens)

    def draw_facts(self, rng: random.Random) -> dict[str, tuple[str, ...]]:
        """The planted facts: `keys` distinct keys, the first with `values` values."""
        facts: dict[str, tuple[str, ...]] = {}
        while len(facts) < self.keys:
            facts[self.surface.draw(self.key, rng)] = tuple(
                self.surface.draw(self.value, rng) for _ in range(self.values)
            )
        return facts

    def hide(self, facts: dict[str, tuple[str, ...]], length: int, rng: random.Random, count: CountTokens) -> str:
        """The context of at most `length` tokens in which the facts stand at random depths of the filler.

        Raises:
            ValueError: `length` does not even hold the facts.
        """
        needles: list[tuple[float, str]] = []
        for key, values in facts.items():  # values of one key appear in the order of the answer
            depths = sorted(self._depth(rng) for _ in values)
            texts = [self.surface.needle(key, value, self.value) for value in values]
            needles += zip(depths, texts, strict=True)
        upper = max(length // 4, 1)
        filler = self._filler(upper, facts, rng)

        def context(size: int) -> str:
            text = " ".join(interleave(filler[:size], needles))
            return self.surface.context(text, values=len(needles), kind=self.value)

        size = largest_fit(lambda size: count(context(size)) <= length, upper=len(filler))
        return context(size)

    def _depth(self, rng: random.Random) -> float:
        # stretched over both ends by their share, then cut off: exactly 0 and 1 are drawn that often
        return min(max((rng.random() - self.edges) / (1 - 2 * self.edges), 0.0), 1.0)

    def _filler(self, size: int, facts: dict[str, tuple[str, ...]], rng: random.Random) -> list[str]:
        if self.filler == "noise":
            return noise(size)
        if self.filler == "text":
            return sentences(size, rng)
        # Distinct keys; a surface whose keys are single nouns runs out of them, and noise takes the rest.
        room = len(NOUNS) - len(facts) if self.key == "word" and self.surface.name == "mini" else size
        others: dict[str, str] = {}
        while len(others) < min(size, room):
            key = self.surface.draw(self.key, rng)
            if key not in facts and key not in others:
                others[key] = self.surface.needle(key, self.surface.draw(self.value, rng), self.value)
        return list(others.values()) + noise(size - len(others))


def needle_tasks(surface: Surface) -> tuple[NeedleTask, ...]:
    """RULER's eight needle tasks in the wording of `surface`."""

    def task(
        name: str,
        filler: Literal["noise", "text", "needles"],
        key: Kind = "word",
        value: Kind = "number",
        **counts: int,
    ) -> NeedleTask:
        return NeedleTask(f"{surface.name}/niah_{name}", surface, filler, key, value, **counts)

    return (
        task("single_1", "noise"),
        task("single_2", "text"),
        task("single_3", "text", value="id"),
        task("multikey_1", "text", keys=4),
        task("multikey_2", "needles"),
        task("multikey_3", "needles", key="id", value="id"),
        task("multivalue", "text", values=4),
        task("multiquery", "text", keys=4, queries=4),
    )
