"""Surfaces, the wording of retrieval tasks: RULER's own strings, and a short form of them for small models.

`MINI` says the same in a third of the tokens, with keys of one token and numbers of four digits. Its figures
are never comparable with RULER's, so its tasks carry their own names.
"""

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from kvjax.eval.tasks.sample import Question
from kvjax.eval.tasks.words import ADJECTIVES, NOUNS

Kind = Literal["word", "number", "id"]


def _list(words: tuple[str, ...], last: str) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + last + words[-1]


@dataclass(frozen=True)
class MiniSurface:
    """Sentences of ten tokens: 'The code for apple is 4719.'"""

    name: str = "mini"
    niah_max_new_tokens: int = 48
    vt_max_new_tokens: int = 16

    def draw(self, kind: Kind, rng: random.Random) -> str:
        """A random key or value; an 'id' is two numbers of four digits."""
        if kind == "word":
            return rng.choice(NOUNS)
        number = f"{rng.randrange(10_000):04d}"
        return number if kind == "number" else f"{number}-{rng.randrange(10_000):04d}"

    def needle(self, key: str, value: str, kind: Kind) -> str:
        """The sentence that states one fact."""
        return f"The code for {key} is {value}."

    def context(self, text: str, *, values: int, kind: Kind) -> str:
        """The haystack with whatever the surface says before it."""
        return text + "\n"

    def ask(self, facts: dict[str, tuple[str, ...]], kind: Kind) -> Question:
        """Asks for every value of every key in `facts`: either one key, or several keys of one value each."""
        answers = tuple(value for values in facts.values() for value in values)
        keys = tuple(facts)
        if len(keys) == 1:
            be, noun = ("is", "code") if len(answers) == 1 else ("are", "codes")
            question = f"What {be} the {noun} for {keys[0]}?\n"
            return Question(question, f"The {noun} for {keys[0]} {be}", answers, f" {', '.join(answers)}.")
        pairs = ", ".join(f"{key} is {value}" for key, value in zip(keys, answers, strict=True))
        return Question(f"What are the codes for {_list(keys, ' and ')}?\n", "The codes are:", answers, f" {pairs}.")

    def names(self, count: int, rng: random.Random) -> list[str]:
        """Distinct variable names."""
        return rng.sample(NOUNS, count)

    def assign(self, target: str, source: str, *, first: bool) -> str:
        """The statement that `target` holds what `source` holds; `first`: `source` is a value."""
        return f"Copy {source} to {target}."

    def track(self, value: str, chain: tuple[str, ...]) -> Question:
        """Asks for all variables that hold `value`."""
        return Question(f"Where does {value} go?\n", f"{value} goes to", chain, f" {', '.join(chain)}.")

    def track_context(self, text: str) -> str:
        """The haystack of a variable tracking task with its introduction."""
        return text + "\n"


@dataclass(frozen=True)
class RulerSurface:
    """The strings of RULER (Hsieh et al. 2024), for models trained on the web's text."""

    name: str = "ruler"
    niah_max_new_tokens: int = 128
    vt_max_new_tokens: int = 30

    def draw(self, kind: Kind, rng: random.Random) -> str:
        """A random key or value; an 'id' is a UUID."""
        if kind == "word":
            return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
        if kind == "number":
            return str(rng.randrange(1_000_000, 10_000_000))
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def _plural(self, kind: Kind) -> str:
        return {"word": "words", "number": "numbers", "id": "uuids"}[kind]

    def needle(self, key: str, value: str, kind: Kind) -> str:
        """The sentence that states one fact."""
        return f"One of the special magic {self._plural(kind)} for {key} is: {value}."

    def context(self, text: str, *, values: int, kind: Kind) -> str:
        """The haystack with whatever the surface says before it."""
        what = self._plural(kind)
        hidden, it = (
            (f"Some special magic {what} are", what) if values > 1 else (f"A special magic {what[:-1]} is", what[:-1])
        )
        return (
            f"{hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {it} afterwards.\n{text}\n"
        )

    def ask(self, facts: dict[str, tuple[str, ...]], kind: Kind) -> Question:
        """Asks for every value of every key in `facts`."""
        answers = tuple(value for values in facts.values() for value in values)
        keys, what = _list(tuple(facts), ", and "), self._plural(kind)
        if len(answers) == 1:
            question = f"What is the special magic {what[:-1]} for {keys} mentioned in the provided text?\n"
            prefix = f"The special magic {what[:-1]} for {keys} mentioned in the provided text is"
        else:
            question = f"What are all the special magic {what} for {keys} mentioned in the provided text?\n"
            prefix = f"The special magic {what} for {keys} mentioned in the provided text are"
        return Question(question, prefix, answers, f" {_list(answers, ', and ')}.")

    def names(self, count: int, rng: random.Random) -> list[str]:
        """Distinct variable names: five capitals each."""
        made: dict[str, None] = {}
        while len(made) < count:
            made["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))] = None
        return list(made)

    def assign(self, target: str, source: str, *, first: bool) -> str:
        """The statement that `target` holds what `source` holds; `first`: `source` is a value."""
        return f"VAR {target} = {source if first else f'VAR {source}'}."

    def track(self, value: str, chain: tuple[str, ...]) -> Question:
        """Asks for all variables that hold `value`."""
        question = f"Question: Find all variables that are assigned the value {value} in the text above.\n"
        prefix = (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(chain)} variables are assigned the value {value}, they are:"
        )
        return Question(question, prefix, chain, f" {' '.join(chain)}")

    def track_context(self, text: str) -> str:
        """The haystack of a variable tracking task with its introduction."""
        rule = "Memorize and track the chain(s) of variable assignment hidden in the following text."
        return f"{rule}\n\n{text}\n"


Surface = MiniSurface | RulerSurface
MINI = MiniSurface()
RULER = RulerSurface()
