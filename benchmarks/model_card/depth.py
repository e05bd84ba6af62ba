"""Needle depth: the same sample with its needle moved to a chosen place of the context."""

import re
from dataclasses import replace

from kvjax.eval.tasks import Sample

_BETWEEN = re.compile(r"(?<=\.) ")


def at_depth(sample: Sample, depth: float) -> Sample:
    """The sample with the one sentence that holds its answer moved; 0 is the first of the context, 1 the last.

    Depth counts sentences. A task with several needles has no one depth.

    Raises:
        ValueError: `depth` outside [0, 1], several answers, or the answer stands in no sentence or in several.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}, must be in [0, 1]")
    if len(sample.answers) != 1:
        raise ValueError(f"{len(sample.answers)} answers: only a sample with one has a depth")
    sentences = _BETWEEN.split(sample.context.rstrip("\n"))
    holding = [index for index, sentence in enumerate(sentences) if sample.answers[0] in sentence]
    if len(holding) > 1:  # another key has the same value by chance: the queried one is named in the answer's beginning
        holding = [index for index in holding if sample.answer_prefix in sentences[index]]
    if len(holding) != 1:
        raise ValueError(f"{len(holding)} sentences hold the answer {sample.answers[0]!r}, one must")
    needle = sentences.pop(holding[0])
    sentences.insert(round(depth * len(sentences)), needle)
    return replace(sample, context=" ".join(sentences) + "\n")
