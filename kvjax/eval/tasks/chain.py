"""Arithmetic in steps over facts that lie far apart: each fact needs the result of the one before.

The reply writes the intermediate results down and ends in '#### result', as GSM8K's do. Unlike GSM8K's short
stories, the statements are scattered over a long text, with a second chain that must not be followed.
"""

import random
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvjax.eval.tasks.fitting import fit_sample, interleave
from kvjax.eval.tasks.sample import CountTokens, Question, Sample
from kvjax.eval.tasks.task import GeneratedTask
from kvjax.eval.tasks.words import NOUNS, noise

_PEOPLE = """
Ada Bruno Clara Daniel Elena Felix Greta Hugo Ida Jakob Karl Laura Martin Nora Oscar Paula Rosa Simon Thea Victor
"""


@dataclass(frozen=True)
class Step:
    """`name` holds `result`; for the first step of a chain `source` is '' and `change` its result."""

    name: str
    source: str
    before: int
    change: int
    result: int


@runtime_checkable
class ChainWords(Protocol):
    """The wording of steps, and the numbers in them."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the answer may take."""
        ...

    def names(self, count: int, rng: random.Random) -> list[str]:
        """Distinct names."""
        ...

    def numbers(self, steps: int, rng: random.Random) -> list[int]:
        """The results of `steps` steps, each different from the one before and none negative."""
        ...

    def statement(self, step: Step) -> str:
        """The sentence of the text that makes one step."""
        ...

    def context(self, text: str) -> str:
        """The haystack and what is said before it."""
        ...

    def ask(self, steps: list[Step]) -> Question:
        """Asks for the last result."""
        ...


@dataclass(frozen=True)
class PlainChain:
    """Apples of people, with numbers below 1,000."""

    max_new_tokens: int = 256

    def names(self, count: int, rng: random.Random) -> list[str]:
        return rng.sample(_PEOPLE.split(), count)

    def numbers(self, steps: int, rng: random.Random) -> list[int]:
        made = [rng.randrange(20, 200)]
        while len(made) < steps:
            change = rng.randrange(2, 60) * rng.choice((1, -1))
            made.append(made[-1] + change if made[-1] + change > 0 else made[-1] + abs(change))
        return made

    def statement(self, step: Step) -> str:
        if not step.source:
            return f"{step.name} has {step.result} apples."
        more = f"{step.change} more" if step.change > 0 else f"{-step.change} fewer"
        return f"{step.name} has {more} apples than {step.source}."

    def context(self, text: str) -> str:
        return f"Some sentences of the following text say how many apples people have. Memorize them.\n\n{text}\n"

    def ask(self, steps: list[Step]) -> Question:
        solution = [f" {steps[0].name} has {steps[0].result} apples."]
        for step in steps[1:]:
            sign = "+" if step.change > 0 else "-"
            solution.append(f"{step.name} has {step.before} {sign} {abs(step.change)} = {step.result} apples.")
        last = steps[-1]
        return Question(
            f"Question: How many apples does {last.name} have? Write down the intermediate results, "
            "and the result at the end after ####.\n",
            "Answer:",
            (str(last.result),),
            " ".join(solution) + f"\n#### {last.result}",
        )


@dataclass(frozen=True)
class MiniChain:
    """One digit numbers and steps of 1 to 3: 'The bear has 2 more than the fox.'"""

    max_new_tokens: int = 64

    def names(self, count: int, rng: random.Random) -> list[str]:
        return rng.sample(NOUNS, count)

    def numbers(self, steps: int, rng: random.Random) -> list[int]:
        made = [rng.randrange(10)]
        while len(made) < steps:
            made.append(rng.choice([n for n in range(10) if 1 <= abs(n - made[-1]) <= 3]))
        return made

    def statement(self, step: Step) -> str:
        if not step.source:
            return f"The {step.name} has {step.result}."
        return f"The {step.name} has {abs(step.change)} {'more' if step.change > 0 else 'less'} than the {step.source}."

    def context(self, text: str) -> str:
        return text + "\n"

    def ask(self, steps: list[Step]) -> Question:
        solution = [f" The {steps[0].name} has {steps[0].result}."]
        for step in steps[1:]:
            sign = "+" if step.change > 0 else "-"
            solution.append(f"The {step.name} has {step.before} {sign} {abs(step.change)} = {step.result}.")
        last = steps[-1]
        reply = " ".join(solution) + f"\n#### {last.result}"
        return Question(f"How much has the {last.name}?\n", "Step by step:", (str(last.result),), reply)


@dataclass(frozen=True)
class ChainTask(GeneratedTask):
    """A chain of `steps` statements among `chains - 1` others of the same shape and five sentences of noise."""

    metric = "gsm8k"
    name: str
    wording: ChainWords
    steps: int
    chains: int = 2

    def __post_init__(self) -> None:
        if self.steps < 2 or self.chains < 1:
            raise ValueError(f"steps must be >= 2 and chains >= 1, got {self.steps} and {self.chains}")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        names = self.wording.names(self.chains * self.steps, rng)
        chains = [self._chain(names[i :: self.chains], rng) for i in range(self.chains)]
        # statements stand in any order: to follow a chain one has to go back and forth
        statements = [(rng.random(), self.wording.statement(step)) for chain in chains for step in chain]
        question = self.wording.ask(chains[0])
        return fit_sample(
            lambda size: self.wording.context(" ".join(interleave(noise(size), statements))),
            [question],
            max_new_tokens=self.wording.max_new_tokens,
            length=length,
            upper=max(length // 2, 1),
            count=count,
        )

    def _chain(self, names: list[str], rng: random.Random) -> list[Step]:
        results = self.wording.numbers(len(names), rng)
        steps = [Step(names[0], "", 0, results[0], results[0])]
        for name, result in zip(names[1:], results[1:], strict=True):
            former = steps[-1]
            steps.append(Step(name, former.name, former.result, result - former.result, result))
        return steps


def chain_tasks() -> tuple[ChainTask, ...]:
    """Five steps in plain English, three in short sentences."""
    return ChainTask("text/chain", PlainChain(), steps=5), ChainTask("mini/chain", MiniChain(), steps=3)
