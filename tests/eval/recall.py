"""A task that the induction transformer solves exactly: what followed a word that appears once, among one filler."""

from dataclasses import dataclass

from benchmarks.model_card.induction import Induction
from kvjax.eval.tasks import Question, Sample

SIZES = Induction(vocabulary=64, max_position=512)
LENGTH = 256  # tokens of a sample
ROOM = 16
BUDGET = 96  # a window of 32, and one needle with all that max-pooling takes along


@dataclass(frozen=True)
class Recall:
    """Two needles far from each other, from both ends and from the last queries; asked in `turns` turns.

    The first question's needle is the later one. In layer 0 every query looks one token back, in layer 1 the
    question's last token looks at its needle and all others at the end: so it is known what is kept.
    """

    name: str = "recall"
    metric: str = "string_match_all"
    turns: int = 1

    def sample(self, *, length, seed, count):
        words = ["t0"] * (length - 8)
        needles = [(f"t{10 + seed % 10}", f"t{20 + seed % 10}"), (f"t{40 + seed % 10}", f"t{50 + seed % 10}")]
        for start, needle in zip((3 * length // 5, 3 * length // 10), needles, strict=True):
            words[start : start + 2] = needle
        first, *later = (Question("t0\n", key, (value,), f" {value}") for key, value in needles[: self.turns])
        return Sample(
            " ".join(words) + "\n", first.question, first.answer_prefix, first.answers, 1, tuple(later), first.reply
        )
