"""Variable tracking: a value is handed from name to name through a long text; which names hold it?

Other chains of the same shape distract, so the answer needs every hop and not only the names' looks.
"""

from dataclasses import dataclass

from kvjax.eval.tasks.fitting import fit_sample, interleave
from kvjax.eval.tasks.sample import CountTokens, Sample
from kvjax.eval.tasks.surface import Surface
from kvjax.eval.tasks.task import GeneratedTask
from kvjax.eval.tasks.words import noise


@dataclass(frozen=True)
class VariableTask(GeneratedTask):
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

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
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
        return fit_sample(
            lambda size: self.surface.track_context(" ".join(interleave(noise(size), statements))),
            [question],
            max_new_tokens=self.surface.vt_max_new_tokens,
            length=length,
            upper=max(length // 4, 1),
            count=count,
        )
