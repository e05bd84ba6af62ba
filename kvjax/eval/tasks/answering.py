"""Questions over documents: each document tells of one person, and a question asks for one fact of one of them.

All documents share their templates, so only the name tells them apart. With two hops the name asked about leads to
another document, which holds the fact.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvjax.eval.tasks.fitting import fit_sample, interleave
from kvjax.eval.tasks.sample import CountTokens, Question, Sample
from kvjax.eval.tasks.task import GeneratedTask
from kvjax.eval.tasks.words import NOUNS, sentences

_FIRST = """
Ada Alma Anton Arthur Bella Bruno Clara Conrad Daniel Dora Edgar Elena Emil Felix Flora Frida Georg Greta Hanna
Henry Hugo Ida Iris Ivan Jakob Julia Karl Laura Leo Lena Lucas Marie Martin Nina Nora Oscar Otto Paula Peter Rosa
Rudolf Simon Sofia Stefan Thea Theo Vera Victor Walter Wanda
"""
_LAST = """
Abbott Adler Baker Barton Becker Bishop Brandt Carter Castell Crane Dalton Decker Drake Ellis Farrow Fischer Fleming
Foster Garner Gibson Graham Hale Hansen Hartley Hobbs Holm Jansen Keller Kessler Lambert Larkin Lindner Lowell Mercer
Miller Morris Nolan Norton Olsen Palmer Parker Porter Quinn Ramsey Reuter Rowland Sander Sawyer Shelby Stein Talbot
Tanner Thorne Turner Vogel Walden Weber Winter Wolfe Young
"""
_JOBS = """
architect astronomer baker barber biologist bookbinder brewer carpenter chemist clockmaker composer dentist gardener
geologist glassblower historian jeweller journalist judge librarian locksmith mason miller nurse painter pharmacist
photographer pilot plumber potter sailor sculptor shepherd surgeon tailor teacher translator weaver
"""
_TOWNS = """
Aldermoor Ashbrook Birchwood Blackwater Brindle Calverton Clearwater Cranmore Dunmore Eastbourne Elmhurst Fairview
Foxhollow Glenwood Greywater Harlow Hazelton Highfield Kingsport Lakeview Larkspur Longmeadow Maplewood Marlow
Millbrook Newbridge Northgate Oakridge Pinehurst Queensbury Ravenna Riverside Rosedale Silverton Stonebridge
Summerfield Thornbury Underhill Westbrook Willowdale
"""
_INSTRUMENTS = """
accordion banjo bassoon bugle cello clarinet cornet cymbals fiddle flute guitar harmonica harp harpsichord horn lute
lyre mandolin oboe organ piano piccolo recorder saxophone tambourine trombone trumpet tuba viola violin zither
"""


@dataclass(frozen=True)
class Person:
    """The subject of a document: facts, one an aspect, and the friend whom a second hop leads to."""

    name: str
    facts: tuple[str, ...]
    friend: str


@runtime_checkable
class AnsweringWords(Protocol):
    """The wording of documents and questions."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens that the answer may take."""
        ...

    def names(self, count: int, rng: random.Random) -> list[str]:
        """Distinct names: `count` of them, or all there are."""
        ...

    def facts(self, rng: random.Random) -> tuple[str, ...]:
        """Random facts, one an aspect."""
        ...

    def document(self, person: Person) -> str:
        """The document about a person."""
        ...

    def filler(self, count: int, rng: random.Random) -> list[str]:
        """Documents about nobody, for when the names are used up; may be empty."""
        ...

    def context(self, documents: list[str]) -> str:
        """The documents in their order, and what stands around them."""
        ...

    def ask(self, person: Person, aspect: int, friend: Person | None) -> Question:
        """Asks for a fact of `person`, or of the `friend` whom the document of `person` names."""
        ...


@dataclass(frozen=True)
class PlainAnswering:
    """RULER's instructions around short lives of people."""

    max_new_tokens: int = 32

    def names(self, count: int, rng: random.Random) -> list[str]:
        first, last = _FIRST.split(), _LAST.split()
        initials = [""] if count <= len(first) * len(last) else [f" {letter}." for letter in "ABCDEFGHIJKLMNOPRST"]
        pool = [f"{one}{initial} {two}" for one in first for initial in initials for two in last]
        return rng.sample(pool, min(count, len(pool)))

    def facts(self, rng: random.Random) -> tuple[str, ...]:
        return (
            rng.choice(_JOBS.split()),
            rng.choice(_TOWNS.split()),
            rng.choice(_INSTRUMENTS.split()),
            str(rng.randrange(1700, 2000)),
        )

    def document(self, person: Person) -> str:
        job, town, instrument, year = person.facts
        return (
            f"{person.name}\n{person.name} was born in the year {year} and grew up in {town}. "
            f"After school came an apprenticeship as a {job}, which became a profession for life. "
            f"In the evenings there was music: {person.name} played the {instrument}. "
            f"The closest friend of {person.name} was {person.friend}."
        )

    def filler(self, count: int, rng: random.Random) -> list[str]:
        return []

    def context(self, documents: list[str]) -> str:
        numbered = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, 1))
        rule = "Answer the question based on the given documents. Only give me the answer and do not output any other"
        return f"{rule} words.\n\nThe following are given documents.\n\n{numbered}\n\n{rule} words.\n\n"

    def ask(self, person: Person, aspect: int, friend: Person | None) -> Question:
        who = f"the closest friend of {person.name}" if friend else person.name
        questions = (
            f"What was the profession of {who}?",
            f"In which town did {who} grow up?",
            f"Which instrument did {who} play?",
            f"In which year was {who} born?",
        )
        answer = (friend or person).facts[aspect]
        return Question(f"Question: {questions[aspect]}\n", "Answer:", (answer,), f" {answer}")


@dataclass(frozen=True)
class MiniAnswering:
    """Documents of four sentences of seven tokens: 'The town of fox is lake.'"""

    max_new_tokens: int = 4
    # nouns too, since those are single tokens
    _aspects = ("town", "fruit", "ship")
    _friend = "sister"

    @property
    def _nouns(self) -> list[str]:
        return [noun for noun in NOUNS if noun not in (*self._aspects, self._friend)]

    def names(self, count: int, rng: random.Random) -> list[str]:
        return rng.sample(self._nouns, min(count, len(self._nouns)))

    def facts(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.sample(self._nouns, len(self._aspects)))

    def document(self, person: Person) -> str:
        facts = (*zip(self._aspects, person.facts, strict=True), (self._friend, person.friend))
        return " ".join(f"The {aspect} of {person.name} is {fact}." for aspect, fact in facts)

    def filler(self, count: int, rng: random.Random) -> list[str]:
        return sentences(count, rng)

    def context(self, documents: list[str]) -> str:
        return "\n".join(documents) + "\n"

    def ask(self, person: Person, aspect: int, friend: Person | None) -> Question:
        who = f"the {self._friend} of {person.name}" if friend else person.name
        topic, answer = f"{self._aspects[aspect]} of {who}", (friend or person).facts[aspect]
        return Question(f"What is the {topic}?\n", f"The {topic} is", (answer,), f" {answer}.")


@dataclass(frozen=True)
class AnsweringTask(GeneratedTask):
    """Question answering over as many documents as fit; `hops` is 1 or 2."""

    metric = "string_match_part"
    name: str
    wording: AnsweringWords
    hops: int = 1

    def __post_init__(self) -> None:
        if self.hops not in (1, 2):
            raise ValueError(f"hops must be 1 or 2, got {self.hops}")

    def sample(self, *, length: int, seed: int, count: CountTokens) -> Sample:
        rng = self.rng(length, seed)
        people = list(self._people(length // 8 + 3, rng))
        person, friend = people[0], people[1] if self.hops == 2 else None
        question = self.wording.ask(person, rng.randrange(len(person.facts)), friend)
        needed = [self.wording.document(one) for one in people[: self.hops]]
        places = [rng.random() for _ in needed]
        others = [self.wording.document(one) for one in people[self.hops :]]
        others += self.wording.filler(length // 8, rng)
        placed = list(zip(places, needed, strict=True))
        return fit_sample(
            lambda size: self.wording.context(interleave(others[:size], placed)),
            [question],
            max_new_tokens=self.wording.max_new_tokens,
            length=length,
            upper=len(others),
            count=count,
        )

    def _people(self, count: int, rng: random.Random) -> Iterator[Person]:
        """People of whom the first names the second as a friend, and every other one anybody."""
        names = self.wording.names(count, rng)
        for i, name in enumerate(names):
            other = rng.randrange(len(names) - 1)
            friend = names[1] if i == 0 else names[other + (other >= i)]
            yield Person(name, self.wording.facts(rng), friend)


def answering_tasks() -> tuple[AnsweringTask, ...]:
    """One hop (as SQuAD in RULER) and two (as HotpotQA), in RULER's instructions and in short sentences."""
    wordings: tuple[tuple[str, AnsweringWords], ...] = (("ruler", PlainAnswering()), ("mini", MiniAnswering()))
    return tuple(AnsweringTask(f"{name}/qa_{hops}", wording, hops) for name, wording in wordings for hops in (1, 2))
