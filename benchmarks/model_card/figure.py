"""Figures of the retrieval gate: the accuracy of one task at one length, and the bars they are held to."""

from dataclasses import dataclass

# Needle tasks of one answer, which must be found nearly always, and tracking; other tasks only inform.
BARS = {f"mini/niah_{kind}_{number}": 0.95 for kind in ("single", "multikey") for number in (1, 2, 3)}
BARS["mini/vt"] = 0.90


@dataclass(frozen=True)
class Figure:
    """One task at one length in one form of prompt.

    Attributes:
        accuracy: mean share of the answers found, full cache, greedy.
        depths: accuracy by depth of the needle (0 is the first sentence); empty for tasks with several needles.
        agreement: share of generated tokens that transformers finds too, over the first `compared` samples.
    """

    task: str
    form: str
    length: int
    samples: int
    accuracy: float
    depths: dict[float, float]
    compared: int
    agreement: float | None

    @property
    def passes(self) -> bool:
        """Whether it reaches its bar, if it has one."""
        return self.accuracy >= BARS.get(self.task, 0.0)
