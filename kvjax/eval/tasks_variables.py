"""Variable tracking: a value is handed from name to name through a long text; which names hold it?

Other chains of the same shape distract, so the answer needs every hop and not only the names' looks.
"""

import random
from dataclasses import dataclass

from kvjax.eval.tasks_sample import CountTokens, Sample, largest_fit
from kvjax.eval.tasks_surface import Surface
from kvjax.eval.tasks_words import noise


@dataclass(frozen=True)
class VariableTask:
    """A variable tracking task of any length.

    Attributes:
        surface: how statements are worded.
        hops: assignments after the first one; a chain names `hops + 1` variables.
        chains: chains in the text; one of them is asked for.
    """

    name: str
    surface: Surface
    hops: int = 4
    chains: int = 2

    def __post_init__(self) -> None:
        if self.hops < 0 or self.chains < 1:
            raise ValueError(f"hops must be >= 0 and chains >= 1, got {self.hops} and {self.chains}")

    @property
    def metric(self) -> str:
        """A key of `METRICS`."""
        return "string_match_all"

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """A test case whose prompt and answer take at most `length` tokens, and nearly that.

        Raises:
            ValueError: `length` does not even hold the statements and the question.
        """
        rng = random.Random(f"{self.name}/{length}/{seed}")
        names = self.surface.names(self.chains * (self.hops + 1), rng)
        chains = [tuple(names[i :: self.chains]) for i in range(self.chains)]
        values: list[str] = []
        while len(values) < self.chains:
            value = self.surface.draw("number", rng)
            values += [value] if value not in values else []
        statements = []
        for chain, value in zip(chains, values, strict=True):
            depths = sorted(rng.random() for _ in chain)
            sources = (value, *chain[:-1])
            statements += [
                (depth, self.surface.assign(target, source, first=source == value))
                for depth, target, source in zip(depths, chain, sources, strict=True)
            ]
        question = self.surface.track(values[0], chains[0])
        room = length - count(question.question + question.answer_prefix + question.reply)

        def context(size: int) -> str:
            placed = [((index + 0.5) / max(size, 1), text) for index, text in enumerate(noise(size))]
            text = " ".join(text for _, text in sorted(placed + statements, key=lambda item: item[0]))
            return self.surface.track_context(text)

        size = largest_fit(lambda size: count(context(size)) <= room, upper=max(length // 4, 1))
        return Sample(
            context(size),
            question.question,
            question.answer_prefix,
            question.answers,
            self.surface.vt_max_new_tokens,
            reply=question.reply,
        )
