"""How well a model writes Python that training held out: bits a byte and the next line, against a byte 5-gram.

The 5-gram has counted the very files that the model was trained on, and both are asked about the same bytes.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kvjax.eval.metrics import edit_similarity
from kvjax.models import Decoder, load
from kvjax.train.corpus import standard_library
from kvjax.train.greedy import Greedy
from kvjax.train.ngram import ByteNgram

NEW = 48  # tokens that a line may take
SHORTEST = 12  # bytes of a line worth asking for


@dataclass(frozen=True)
class Line:
    """A line to write: the file up to its first character that is no blank, and the rest of the line."""

    context: str
    line: str


@dataclass(frozen=True)
class Scores:
    """Bits a byte (less is better) and mean edit similarity of the next line (more is better)."""

    bits: float
    similarity: float
    exact: float


def lines(files: list[tuple[str, str]], count: int, seed: int = 0) -> list[Line]:
    """`count` lines of code drawn from the second halves of files: no comments, and nothing short.

    Raises:
        ValueError: the files hold too few.
    """
    found = []
    for _, text in files:
        every = text.splitlines(keepends=True)
        start = sum(map(len, every[: len(every) // 2]))
        for line in every[len(every) // 2 :]:
            code = line.strip()
            if len(code) >= SHORTEST and not any(mark in code for mark in ("#", "`", "//")):
                found.append(Line(text[: start + len(line) - len(line.lstrip())], code))
            start += len(line)
    if len(found) < count:
        raise ValueError(f"the files have {len(found)} lines to ask for, {count} were wanted")
    return random.Random(seed).sample(found, count)


def windows(tokens: int, length: int, count: int) -> list[int]:
    """Starts of `count` windows of `length` tokens, spread evenly; only a window's second half is scored.

    Raises:
        ValueError: their second halves would overlap.
    """
    starts = np.linspace(0, tokens - length, count).astype(int).tolist()
    if tokens < length or (count > 1 and starts[1] - starts[0] < length // 2):
        raise ValueError(f"{tokens} tokens do not hold {count} windows of {length}: fewer samples or a shorter length")
    return starts


class Measurement:
    """A model and a baseline, asked the same."""

    def __init__(self, decoder: Decoder, tokenizer: Any, ngram: ByteNgram) -> None:
        self.tokenizer, self.ngram, self.greedy = tokenizer, ngram, Greedy(decoder)
        graph, params = nnx.split(decoder)
        self._losses = partial(jax.jit(_losses, static_argnums=0), graph, params)

    def bits(self, text: str, length: int, samples: int, batch: int) -> tuple[float, float]:
        """Bits a byte of the model and of the 5-gram over the same bytes of `text`."""
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.int32)
        # where each token begins, in bytes; a token inside a character begins where the character does
        before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
        begins = np.append(before[[start for start, _ in encoded["offset_mapping"]]], before[-1])
        counting = self.ngram.bits(text.encode())
        model, baseline, size = 0.0, 0.0, 0
        starts = windows(len(ids), length, samples)
        for first in range(0, len(starts), batch):
            some = starts[first : first + batch]
            padded = some + some[:1] * (batch - len(some))
            losses = np.asarray(self._losses(jnp.asarray(np.stack([ids[s : s + length] for s in padded]))))
            for start, costs in zip(some, losses, strict=False):
                half = length // 2
                model += float(costs[half - 1 :].sum()) / np.log(2)
                begin, end = begins[start + half], begins[start + length]
                baseline += float(counting[begin:end].sum())
                size += end - begin
        return model / size, baseline / size

    def lines(self, wanted: list[Line], length: int, batch: int) -> tuple[list[str], list[str]]:
        """What the model and the 5-gram write, greedily, to complete each line after the last `length` tokens."""
        # a word's token holds the blank before it, so the model must write the last blank of the indentation itself
        texts = [line.context[-8 * length :].removesuffix(" ") for line in wanted]
        prompts = [self.tokenizer(text)["input_ids"][-length:] for text in texts]
        replies = self.greedy.generate(prompts, size=length, batch=batch, new=NEW)
        texts = [self.tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
        counted = [self.ngram.line(line.context[-64:].encode(), 4 * NEW).decode(errors="replace") for line in wanted]
        return [text.split("\n")[0] for text in texts], counted


def _losses(graph: nnx.GraphDef[Decoder], params: Any, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def scores(bits: float, wanted: list[Line], written: list[str]) -> Scores:
    """The mean scores of written lines; blanks around them are not scored."""
    pairs = [(line.line, text.strip()) for line, text in zip(wanted, written, strict=True)]
    similar = [edit_similarity(text, [line]) for line, text in pairs]
    return Scores(bits, float(np.mean(similar)), float(np.mean([line == text for line, text in pairs])))


def main(argv: list[str] | None = None) -> None:
    """Compares a model with a byte 5-gram on held-out Python; ends with status 1 if it does not win."""
    parser = argparse.ArgumentParser(prog="python -m kvjax.train.code", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024, help="tokens of context")
    parser.add_argument("--samples", type=int, default=100, help="windows of text, and lines to write")
    parser.add_argument("--order", type=int, default=5, help="bytes of the n-gram")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    files = standard_library(held_out=True)
    ngram = ByteNgram([text.encode() for _, text in standard_library()], args.order)
    measurement = Measurement(load(args.model), AutoTokenizer.from_pretrained(args.model), ngram)
    batch = max(1, 8192 // args.length)
    text = "".join(text for _, text in files)
    bits = measurement.bits(text, args.length, args.samples, batch)
    wanted = lines(files, args.samples)
    written = measurement.lines(wanted, args.length, batch)
    found = {
        name: scores(cost, wanted, own)
        for name, cost, own in zip(("model", f"{args.order}-gram"), bits, written, strict=True)
    }
    print(f"held-out Python, {args.samples} windows of {args.length} tokens and {args.samples} next lines")
    print(f"{'':10s} {'bits a byte':>12s} {'edit similarity':>16s} {'exact lines':>12s}")
    for name, own in found.items():
        print(f"{name:10s} {own.bits:12.3f} {own.similarity:16.1%} {own.exact:12.1%}")
    if args.json:
        args.json.write_text(json.dumps({name: asdict(own) for name, own in found.items()}, indent=1) + "\n")
    model, baseline = found.values()
    better = model.bits < baseline.bits and model.similarity > baseline.similarity
    print("the model wins" if better else "the model does not win: train longer or on more Python")
    raise SystemExit(not better)


if __name__ == "__main__":
    main()
