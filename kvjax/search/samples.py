"""Samples that budgets are evaluated on: three sets that share nothing, each for one purpose."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from kvjax.eval.tasks import Task

SetName = Literal["search", "selection", "test"]
FIRST_SEED: dict[SetName, int] = {"search": 3_000_000, "selection": 4_000_000, "test": 5_000_000}


@dataclasses.dataclass(frozen=True)
class RankedCase:
    """One sample as tokens.

    Attributes:
        prompt: tokens that are prefilled densely, and then compressed.
        tail: tokens that follow, read through the compressed cache: the question, where compression must not see it,
            and the right reply.
        reply: how many of the last tokens of `tail` are the reply, by which a candidate is evaluated.
    """

    prompt: tuple[int, ...]
    tail: tuple[int, ...]
    reply: int

    def __post_init__(self) -> None:
        if not self.prompt or not 0 < self.reply <= len(self.tail):
            raise ValueError(
                f"a case of {len(self.prompt)} prompt tokens whose reply is {self.reply} of {len(self.tail)}: give a "
                "prompt and a reply"
            )


@dataclasses.dataclass(frozen=True)
class Padded:
    """Cases as arrays, padded with zeros.

    Attributes:
        prompt: to be prefilled; `length` tokens of each are real.
        tail: read after that.
        weight: 1 for the tokens of the reply, which count; 0 for the question and padding.
    """

    prompt: Int[np.ndarray, "S T"]
    length: Int[np.ndarray, "S"]
    tail: Int[np.ndarray, "S R"]
    weight: Float[np.ndarray, "S R"]

    @classmethod
    def of(cls, cases: Sequence[RankedCase], *, shortest: int, longest: int, tail: int) -> "Padded":
        """Cases of `shortest` to `longest` tokens of prompt and at most `tail` after it.

        Raises:
            ValueError: one of them is not.
        """
        prompts, tails = np.zeros((len(cases), longest), np.int32), np.zeros((len(cases), tail), np.int32)
        weight = np.zeros((len(cases), tail), np.float32)
        for row, case in enumerate(cases):
            if not shortest <= len(case.prompt) <= longest or len(case.tail) > tail:
                raise ValueError(
                    f"a prompt of {len(case.prompt)} tokens with a tail of {len(case.tail)}: at least {shortest} and "
                    f"at most {longest}, with at most {tail} after it"
                )
            prompts[row, : len(case.prompt)] = case.prompt
            tails[row, : len(case.tail)] = case.tail
            weight[row, len(case.tail) - case.reply : len(case.tail)] = 1
        return cls(prompts, np.array([len(case.prompt) for case in cases], np.int32), tails, weight)


@dataclasses.dataclass(frozen=True)
class SampleSets:
    """Cases to search with, to choose the winner with, and to report: no prompt is in two of them.

    Raises:
        ValueError: a set is empty, or a prompt is in two sets; such figures would flatter.
    """

    search: tuple[RankedCase, ...]
    selection: tuple[RankedCase, ...]
    test: tuple[RankedCase, ...]

    def __post_init__(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for field in dataclasses.fields(self):
            cases: tuple[RankedCase, ...] = getattr(self, field.name)
            if not cases:
                raise ValueError(f"the {field.name} set is empty: draw some samples for it")
            for case in cases:
                whole = case.prompt + case.tail
                if seen.setdefault(whole, field.name) != field.name:
                    raise ValueError(f"a sample is in the {seen[whole]} set and in the {field.name} set: draw others")

    @property
    def all(self) -> tuple[RankedCase, ...]:
        return self.search + self.selection + self.test


def draw_sets(
    tasks: Sequence[Task],
    encode: Callable[[str], list[int]],
    length: int,
    counts: tuple[int, int, int],
    *,
    query_aware: bool,
) -> SampleSets:
    """Draws the three sets, of `counts` samples each, from the tasks in turn.

    Args:
        encode: the model's tokenizer.
        length: most tokens of prompt and reply.
        query_aware: the question is part of the prompt that is compressed; otherwise it comes after.

    Raises:
        ValueError: a task does not fit the length, or has so few distinct samples that sets would overlap.
    """
    seen: set[RankedCase] = set()
    sets: list[tuple[RankedCase, ...]] = []
    for (name, first), count in zip(FIRST_SEED.items(), counts, strict=True):
        cases: list[RankedCase] = []
        seed = first
        while len(cases) < count:
            if seed - first > 10 * count + 100:
                raise ValueError(f"the tasks have too few distinct samples for {count} of the {name} set: ask for less")
            case = draw_case(tasks[len(cases) % len(tasks)], encode, length, seed, query_aware=query_aware)
            seed += 1
            if case not in seen:
                seen.add(case)
                cases.append(case)
        sets.append(tuple(cases))
    return SampleSets(*sets)


def draw_case(
    task: Task, encode: Callable[[str], list[int]], length: int, seed: int, *, query_aware: bool
) -> RankedCase:
    """One sample of a task as tokens, each part encoded by itself, as a client sends it."""
    sample = task.sample(length=length - 4, seed=seed, count=lambda text: len(encode(text)))
    context, question = encode(sample.context), encode(sample.question + sample.answer_prefix)
    reply = encode(sample.reply or sample.answers[0])
    if query_aware:
        return RankedCase(tuple(context + question), tuple(reply), len(reply))
    return RankedCase(tuple(context), tuple(question + reply), len(reply))
