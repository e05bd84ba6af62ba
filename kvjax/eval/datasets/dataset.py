"""Data sets: the samples of one file, as a task."""

from dataclasses import dataclass, replace

from kvjax.eval.metrics import METRICS
from kvjax.eval.tasks import CountTokens, Sample
from kvjax.eval.tasks.fitting import largest_fit


@dataclass(frozen=True)
class DataSet:
    """All samples of one file.

    Attributes:
        name: `benchmark/data set`.
        metric: how the benchmark scores it: a key of `METRICS`.
        samples: in the order of the file.
        may_cut: whether a context that is too long is cut in its middle, as LongBench does; others cannot be cut,
            since the answer may be anywhere.
    """

    name: str
    metric: str
    samples: tuple[Sample, ...]
    may_cut: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"no metric {self.metric!r}; there are {', '.join(METRICS)}")
        if not self.samples:
            raise ValueError(f"{self.name} has no samples")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        """The sample of number `seed`, counted from 0 and round again after the last.

        Raises:
            ValueError: its questions, or its context where it may not be cut, and its replies of `max_new_tokens`
                take more than `length` tokens.
        """
        index = seed % len(self.samples)
        sample = self.samples[index]
        turns = "".join(turn.question + turn.answer_prefix for turn in sample.turns)
        room = length - count(turns) - len(sample.turns) * sample.max_new_tokens
        if (size := count(sample.context)) <= room:
            return sample
        if not self.may_cut or room < 1:
            raise ValueError(
                f"sample {index} of {self.name} takes {size + length - room} tokens, {length} are allowed: "
                "ask for a greater length, or leave it out"
            )
        half = largest_fit(lambda half: count(_cut(sample.context, half)) <= room, upper=len(sample.context) // 2)
        return replace(sample, context=_cut(sample.context, half))


def _cut(text: str, half: int) -> str:
    """The first and the last `half` characters."""
    return text[:half] + text[len(text) - half :]
