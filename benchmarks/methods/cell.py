"""Cell: one method at one token budget and length, the unit of `benchmarks.methods`."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """An arm with a token budget, None for the full cache, at a length in tokens."""

    arm: str
    budget: int | None
    length: int

    def __str__(self) -> str:
        return f"{self.arm}{'' if self.budget is None else f' {self.budget}'} at {self.length:,}"


def cells(arms: Sequence[str], budgets: Sequence[int], lengths: Sequence[int]) -> list[Cell]:
    """All cells, those of a length together: a table of it is whole before the next one begins."""
    return [
        Cell(arm, budget, length)
        for length in lengths
        for arm in arms
        for budget in ((None,) if arm == "full" else budgets)
    ]
