"""Retained tokens of one prompt, layer by layer, and needle survival: whether the answer is among them."""

import bisect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from kvjax.eval.dialogue import Dialogue
from kvjax.eval.runner import Case, Conduct, draw_sample, template_tokens
from kvjax.eval.targets.engine import EngineTarget


@dataclass(frozen=True)
class Retained:
    """The choice of a method for the first turn of one sample.

    Attributes:
        name: of the task.
        layers: for each layer a mask of the tokens that its heads retain, [K, T]; K may differ.
        question: the token that the question begins with; what comes before is the context.
        answers: tokens of the context that hold the answers to the question.
        later: the same for the questions of later turns.
    """

    name: str
    layers: tuple[Bool[np.ndarray, "_ T"], ...]
    question: int
    answers: tuple[range, ...] = ()
    later: tuple[range, ...] = ()

    @classmethod
    def observe(cls, target: EngineTarget, case: Case, conduct: Conduct) -> "Retained":
        """The tokens that a started engine retains of a case. Blocks.

        Raises:
            TargetFailedError: the sample cannot be made, or the engine refuses it.
        """
        template = template_tokens(target) if conduct.form == "chat" else 0
        sample = draw_sample(case, conduct, target, template)
        dialogue = Dialogue(sample, conduct.form)
        context_prefix = dialogue.history
        tokens, positions = target.retained(
            dialogue.prompt(sample.turns[0]), context_prefix if conduct.query_agnostic else None
        )
        question = target.shared(context_prefix, tokens)
        first, *others = [
            spans(tokens[:question], target.engine.tokenizer.decode, turn.answers) for turn in sample.turns
        ]
        later = tuple(span for turn in others for span in turn)
        return cls(case.task.name, masks(positions, len(tokens)), question, first, later)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.layers[0].shape[1]

    @property
    def share(self) -> float:
        """The share of the prompt that is retained, over all layers and heads."""
        return sum(layer.sum() for layer in self.layers) / sum(layer.size for layer in self.layers)

    def survival(self, layer: int) -> float | None:
        """The share of the answers' tokens that a layer's heads retain; None if the context holds no answer."""
        if not self.answers:
            return None
        return float(np.mean([retained_share(self.layers[layer], span).mean() for span in self.answers]))

    def binned(self, columns: int) -> Float[np.ndarray, "rows columns"]:
        """All heads of all layers, one below the other, each cell the retained share of its tokens."""
        edges = np.linspace(0, self.length, min(columns, self.length) + 1).astype(int)
        rows = np.concatenate(self.layers).astype(np.float64)
        return np.add.reduceat(rows, edges[:-1], axis=1) / np.diff(edges)


def retained_share(layer: Bool[np.ndarray, "K T"], span: range) -> Float[np.ndarray, "K"]:
    """The share of a span's tokens that each head retains."""
    return layer[:, span.start : span.stop].mean(axis=1)


def masks(positions: Iterable[Int[np.ndarray, "_ _"]], length: int) -> tuple[Bool[np.ndarray, "_ T"], ...]:
    """Masks [K, T] of `length` tokens from the positions [K, C] of each layer, in which -1 is none."""
    made = []
    for layer in positions:
        mask = np.zeros((layer.shape[0], length + 1), np.bool_)  # the last column takes the -1
        np.put_along_axis(mask, layer, True, axis=1)
        made.append(mask[:, :length])
    return tuple(made)


def spans(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], answers: Iterable[str]) -> tuple[range, ...]:
    """The tokens of each answer, wherever it stands as a word of its own, in the order of the text."""
    text = decode(tokens)

    def ends(count: int) -> int:
        return len(decode(tokens[:count]))

    matches = set()
    for answer in answers:
        for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text) if answer else ():
            # the first token that reaches beyond the place before the answer, to the one that reaches its end
            counts = range(len(tokens) + 1)
            first = bisect.bisect_right(counts, match.start(), key=ends) - 1
            last = bisect.bisect_left(counts, match.end(), key=ends)
            matches.add((first, last))
    return tuple(range(*span) for span in sorted(matches))
