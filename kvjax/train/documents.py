"""The documents the model learns from: token ids, and which of them count in the loss.

Only predictable tokens count: second copies, values asked for, replies; in Python text every token. Each
function takes its own random generator, so a document depends on nothing but a seed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Integer
from tokenizers import Tokenizer

from kvjax.eval.tasks import Question, Sample
from kvjax.eval.tasks.chain import ChainTask, MiniChain
from kvjax.eval.tasks.needle import NeedleTask
from kvjax.eval.tasks.surface import MINI, Kind
from kvjax.eval.tasks.variables import VariableTask
from kvjax.eval.tasks.words import NOUNS
from kvjax.train.tokenizer import ASSISTANT, END, EOS, PAIRS, SPECIAL, USER


@dataclass(frozen=True)
class Document:
    """Token ids and the loss mask: `mask[t]` says that predicting `tokens[t]` counts."""

    tokens: Int[np.ndarray, "T"]
    mask: Bool[np.ndarray, "T"]


@dataclass
class Writer:
    """Collects text or ids, each with its place in the loss mask."""

    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)

    def text(self, text: str, counts: bool) -> None:
        self.ids(self.tokenizer.encode(text).ids, counts)

    def ids(self, ids: list[int], counts: bool) -> None:
        self.tokens += ids
        self.mask += [counts] * len(ids)

    def document(self, length: int) -> Document:
        """What was written, cut or padded to `length`; padding never counts."""
        missing = max(0, length - len(self.tokens))
        pad = SPECIAL.index("<|pad|>")
        return Document(
            np.array((self.tokens + [pad] * missing)[:length], np.int32),
            np.array((self.mask + [False] * missing)[:length], bool),
        )


class Documents:
    """Draws documents of every kind with one tokenizer and one corpus."""

    def __init__(self, tokenizer: Tokenizer, corpus: Integer[np.ndarray, "N"]) -> None:
        """`corpus`: the ids of the Python text; may be empty if no mix asks for it."""
        self.tokenizer = tokenizer
        self.corpus = corpus
        self.nouns = [tokenizer.encode(f" {noun}").ids[0] for noun in NOUNS]
        # a number's first two digits carry the blank before them, its others do not
        self.first, self.later = ([tokenizer.encode(blank + pair).ids[0] for pair in PAIRS] for blank in (" ", ""))
        self.ordinary = range(len(SPECIAL), tokenizer.get_vocab_size())
        self._kinds: dict[str, Callable[[int, random.Random], Document]] = {
            "repeats": self.repeats,
            "recall": self.recall,
            "needles": self.needles,
            "hard_needles": self.hard_needles,
            "id_needles": self.id_needles,
            "variables": self.variables,
            "chains": self.chains,
            "python": self.python,
        }

    def draw(self, mix: dict[str, float], length: int, rng: random.Random) -> Document:
        """A document of `length` tokens of a kind drawn by the weights of `mix`."""
        kind = rng.choices(list(mix), list(mix.values()))[0]
        return self._kinds[kind](length, rng)

    def of_kind(self, kind: str, length: int, rng: random.Random) -> Document:
        """A document of `length` tokens of one kind."""
        return self._kinds[kind](length, rng)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text).ids)

    def repeats(self, length: int, rng: random.Random) -> Document:
        """A random segment over and over; from the second copy on it counts."""
        size = _spread(2, length // 2, rng)
        few = rng.sample(self.nouns, 8) + rng.sample(self.first, 8) + rng.sample(self.later, 8)
        pools = (self.nouns + self.first + self.later, self.ordinary, rng.sample(self.ordinary, 48), few)
        pool = rng.choices(pools, (4, 2, 2, 2))[0]
        segment = rng.choices(pool, k=size)
        writer = Writer(self.tokenizer)
        writer.ids(segment, False)
        while len(writer.tokens) < length:
            writer.ids(segment, True)
        return writer.document(length)

    def recall(self, length: int, rng: random.Random) -> Document:
        """Keys and values in random order, then the same in another order; second values count.

        A value is one token or, in every other document, a number of several tokens, each one of ten: then its later
        tokens are found by the key as well, since the tokens before them stand in many places.
        """
        more = rng.randint(2, 4) if rng.random() < 0.5 else 0
        pairs = _spread(2, min(length // (3 + more), len(self.nouns)), rng)
        if more:
            first, later = rng.sample(self.first, 10), rng.sample(self.later, 10)
            values = [rng.choices(first, k=1) + rng.choices(later, k=more - 1) for _ in range(pairs)]
        else:
            pool = rng.choice((self.nouns, self.nouns, self.first))
            values = [[token] for token in rng.choices(pool, k=pairs)]
        written = list(zip(rng.sample(self.nouns, pairs), values, strict=True))
        writer = Writer(self.tokenizer)
        for key, value in written:
            writer.ids([key, *value], False)
        while len(writer.tokens) < length:
            for key, value in rng.sample(written, pairs):
                writer.ids([key], False)
                writer.ids(value, True)
        return writer.document(length)

    def needles(self, length: int, rng: random.Random) -> Document:
        """A haystack and questions about it, as plain text or as a chat; replies count."""
        return self._needles(length, rng, shapes=(8, 1, 1), fillers=(1, 1, 1), ids=1)

    def hard_needles(self, length: int, rng: random.Random) -> Document:
        """The same with more of what is learned last: long keys and values among their like, several values or keys."""
        return self._needles(length, rng, shapes=(4, 2, 2), fillers=(1, 1, 3), ids=8)

    def id_needles(self, length: int, rng: random.Random) -> Document:
        """Nearly all of them ids of two numbers, asked one by one, a third at the ends: learned last of all."""
        return self._needles(length, rng, shapes=(1, 0, 0), fillers=(1, 1, 3), ids=40, edges=0.3)

    def _needles(
        self,
        length: int,
        rng: random.Random,
        *,
        shapes: tuple[int, int, int],
        fillers: tuple[int, int, int],
        ids: int,
        edges: float = 0.1,
    ) -> Document:
        filler: Literal["noise", "text", "needles"] = rng.choices(("noise", "text", "needles"), fillers)[0]
        shape = rng.choices(("keys", "values", "queries"), shapes)[0]
        long = ids * int(shape == "keys" and length >= 128)  # ids take room
        key: Kind = rng.choices(("word", "id"), (8, long))[0]
        value: Kind = rng.choices(("number", "word", "id"), (5, 3, long))[0]
        several = rng.randint(2, 4 if length >= 128 else 2)
        task = NeedleTask(
            "train",
            MINI,
            filler,
            key,
            value,
            keys=several if shape == "queries" else 1,
            values=several if shape == "values" else 1,
            queries=several if shape == "queries" else 1,
            edges=edges,
        )
        facts = task.draw_facts(rng)
        questions = [MINI.ask(facts, value)]
        # one needle in the dark, or so many that a good part of all tokens is questions to learn from
        statements = "".join(f" {MINI.needle(k, v, value)}" for k, values in facts.items() for v in values)
        cost = self.count(questions[0].question + questions[0].answer_prefix + questions[0].reply + statements) + 3
        number = int(length * rng.uniform(0.1, 0.8) / cost) if rng.random() < 0.8 else 1
        while len(questions) < number and len(facts) < len(NOUNS) // 2:
            more = task.draw_facts(rng)
            if not facts.keys() & more.keys():
                facts |= more
                questions.append(MINI.ask(more, value))
        rng.shuffle(questions)
        chat = rng.random() < 0.35
        turns = Writer(self.tokenizer)
        for index, question in enumerate(questions):
            self._turn(turns, question, chat=chat, first=index == 0)
        context = task.hide(facts, length - len(turns.tokens) - chat, rng, self.count)
        writer = Writer(self.tokenizer)
        if chat:
            writer.text(USER, False)
        writer.text(context, False)
        return self._joined(writer, turns, length)

    def variables(self, length: int, rng: random.Random) -> Document:
        """A variable tracking test case with its reply, as plain text or as a chat; the reply counts."""
        hops = rng.randint(1, 4)
        chains = rng.randint(1, max(1, min(4, length // (16 * hops + 16))))
        task = VariableTask(f"train/{rng.random()}", MINI, hops=hops, chains=chains)
        return self._sampled(task.sample(length=length - 4, seed=0, count=self.count), length, rng)

    def chains(self, length: int, rng: random.Random) -> Document:
        """An arithmetic chain's test case with its worked reply, as plain text or as a chat; the reply counts."""
        steps = rng.randint(2, 4)
        chains = rng.randint(1, max(1, min(3, length // (40 * steps))))
        task = ChainTask(f"train/{rng.random()}", MiniChain(), steps=steps, chains=chains)
        return self._sampled(task.sample(length=length - 4, seed=0, count=self.count), length, rng)

    def _sampled(self, sample: Sample, length: int, rng: random.Random) -> Document:
        chat = rng.random() < 0.35
        turns = Writer(self.tokenizer)
        self._turn(turns, sample.turns[0], chat=chat, first=True)
        writer = Writer(self.tokenizer)
        if chat:
            writer.text(USER, False)
        writer.text(sample.context, False)
        return self._joined(writer, turns, length)

    def python(self, length: int, rng: random.Random) -> Document:
        """A stretch of the corpus; every token counts."""
        if len(self.corpus) < length:
            raise ValueError(f"the corpus has {len(self.corpus)} tokens, a document takes {length}")
        start = rng.randrange(len(self.corpus) - length + 1)
        return Document(self.corpus[start : start + length].astype(np.int32), np.ones(length, bool))

    def _turn(self, writer: Writer, question: Question, *, chat: bool, first: bool) -> None:
        if chat:
            if not first:
                writer.text(USER, False)
            writer.text(question.question.rstrip("\n") + END + ASSISTANT, False)
            writer.text(question.answer_prefix + question.reply + END, True)
        else:
            writer.text(question.question + question.answer_prefix, False)
            writer.text(question.reply + EOS, True)

    def _joined(self, writer: Writer, turns: Writer, length: int) -> Document:
        writer.tokens += turns.tokens
        writer.mask += turns.mask
        return writer.document(length)


def _spread(least: int, most: int, rng: random.Random) -> int:
    """As often small as large, on a logarithmic scale: the easy cases are where retrieval is first learned."""
    return round(least * (most / least) ** rng.random())


def corpus_ids(tokenizer: Tokenizer, files: list[tuple[str, str]]) -> Integer[np.ndarray, "N"]:
    """All files after one another, each ended by <|eos|>, as one array of uint16 or uint32 ids."""
    eos = SPECIAL.index(EOS)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([text for _, text in files]):
        ids += encoding.ids
        ids.append(eos)
    return np.array(ids, np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
