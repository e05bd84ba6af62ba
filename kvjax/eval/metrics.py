"""How a generated answer is scored, and how sure a mean of scores is."""

import math
from collections.abc import Sequence


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's score: the share of the answers that the prediction holds, case ignored.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("answers is empty: a sample has at least one")
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction holds any of the answers, case ignored, else 0.0.

    Raises:
        ValueError: no answers.
    """
    return float(string_match_all(prediction, answers) > 0)


def wilson_interval(mean: float, count: int, *, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share seen in `count` trials (Wilson 1927); 95% by default.

    Raises:
        ValueError: no trials, or a mean outside [0, 1].
    """
    if count < 1 or not 0.0 <= mean <= 1.0:
        raise ValueError(f"a share in [0, 1] of at least one trial is needed, got {mean} of {count}")
    centre = mean + z * z / (2 * count)
    spread = z * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
