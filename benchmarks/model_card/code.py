"""Code completion on Python that training held out: bits a byte and the next line, against a byte 5-gram.

The 5-gram has counted the very files that the model was trained on, and both predict the same bytes.
"""

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model_card.gate import serving
from benchmarks.model_card.ngram import ByteNgram
from kvjax.engine import Engine, SamplingParams
from kvjax.eval.metrics import edit_similarity
from kvjax.eval.tasks.library import standard_library

NEW = 48  # tokens that a line may take
SHORTEST = 12  # bytes of a line worth asking for


@dataclass(frozen=True)
class Line:
    """A line to write: the file up to its first character that is no blank, and the rest of the line."""

    context: str
    line: str


@dataclass(frozen=True)
class CodeScores:
    """Bits a byte (less is better) and mean edit similarity of the next line (more is better)."""

    bits: float
    similarity: float
    exact: float


def lines(files: list[tuple[str, str]], count: int, seed: int = 0) -> list[Line]:
    """`count` lines of code drawn from the second halves of files: no comments, and nothing short.

    Raises:
        ValueError: the files hold too few.
    """
    candidates = []
    for _, text in files:
        every = text.splitlines(keepends=True)
        start = sum(map(len, every[: len(every) // 2]))
        for line in every[len(every) // 2 :]:
            code = line.strip()
            if len(code) >= SHORTEST and not any(mark in code for mark in ("#", "`", "//")):
                candidates.append(Line(text[: start + len(line) - len(line.lstrip())], code))
            start += len(line)
    if len(candidates) < count:
        raise ValueError(f"the files have {len(candidates)} lines to complete, not {count}")
    return random.Random(seed).sample(candidates, count)


def windows(tokens: int, length: int, count: int) -> list[int]:
    """Starts of `count` windows of `length` tokens, spread evenly; only a window's second half is scored.

    Raises:
        ValueError: their second halves would overlap.
    """
    starts = np.linspace(0, tokens - length, count).astype(int).tolist()
    if tokens < length or (count > 1 and starts[1] - starts[0] < length // 2):
        raise ValueError(f"{tokens} tokens do not hold {count} windows of {length}: fewer samples or a shorter length")
    return starts


class CodeMeasurement:
    """A model, in an engine that has started, and a baseline, on the same text."""

    def __init__(self, engine: Engine, tokenizer: Any, ngram: ByteNgram) -> None:
        """`tokenizer` is the model's as transformers has it, which tells where in a text a token begins."""
        self.engine, self.tokenizer, self.ngram = engine, tokenizer, ngram

    def bits(self, text: str, length: int, samples: int) -> tuple[float, float]:
        """Bits a byte of the model and of the 5-gram over the same bytes of `text`."""
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        # where each token begins, in bytes; a token inside a character begins where the character does
        before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
        begins = np.append(before[[start for start, _ in encoded["offset_mapping"]]], before[-1])
        counting = self.ngram.bits(text.encode())
        starts = windows(len(ids), length, samples)
        read = SamplingParams(max_tokens=0, prompt_logprobs=0)
        windowed = self.engine.generate([ids[start : start + length] for start in starts], read, progress=False)
        model, baseline, size = 0.0, 0.0, 0
        for start, window in zip(starts, windowed, strict=True):
            scored = (window.prompt_logprobs or ())[length // 2 :]
            model -= sum(token.logprob for token in scored if token) / np.log(2)
            begin, end = begins[start + length // 2], begins[start + length]
            baseline += float(counting[begin:end].sum())
            size += end - begin
        return model / size, baseline / size

    def lines(self, expected: list[Line], length: int) -> tuple[list[str], list[str]]:
        """The completions by the model and by the 5-gram, greedily, of each line after the last `length` tokens.

        The model sees fewer if its context has no room for both them and the line.
        """
        room = min(length, self.engine.max_model_len - NEW)
        # a word's token holds the blank before it, so the model must write the last blank of the indentation itself
        texts = [line.context[-8 * length :].removesuffix(" ") for line in expected]
        prompts = [self.tokenizer(text)["input_ids"][-room:] for text in texts]
        write = SamplingParams(max_tokens=NEW, temperature=0.0, stop=("\n",))
        written = [reply.text for reply in self.engine.generate(prompts, write, progress=False)]
        counted = [self.ngram.line(line.context[-64:].encode(), 4 * NEW).decode(errors="replace") for line in expected]
        return written, counted


def scores(bits: float, expected: list[Line], written: list[str]) -> CodeScores:
    """The mean scores of written lines; blanks around them are not scored."""
    pairs = [(line.line, text.strip()) for line, text in zip(expected, written, strict=True)]
    similar = [edit_similarity(text, [line]) for line, text in pairs]
    return CodeScores(bits, float(np.mean(similar)), float(np.mean([line == text for line, text in pairs])))


def main(argv: list[str] | None = None) -> None:
    """Compares a model with a byte 5-gram on held-out Python; ends with status 1 if it does not win."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card.code", description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024, help="tokens of context")
    parser.add_argument("--samples", type=int, default=100, help="windows of text, and lines to write")
    parser.add_argument("--order", type=int, default=5, help="bytes of the n-gram")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    engine = serving(args.model, args.length + NEW)
    if args.length > engine.max_model_len:
        parser.error(f"--length {args.length} is more than the model's context of {engine.max_model_len} tokens")
    files = standard_library(held_out=True)
    ngram = ByteNgram([text.encode() for _, text in standard_library()], args.order)
    text = "".join(text for _, text in files)
    expected = lines(files, args.samples)
    with engine:
        measurement = CodeMeasurement(engine, AutoTokenizer.from_pretrained(args.model), ngram)
        bits = measurement.bits(text, args.length, args.samples)
        written = measurement.lines(expected, args.length)
    figures = {
        name: scores(cost, expected, own)
        for name, cost, own in zip(("model", f"{args.order}-gram"), bits, written, strict=True)
    }
    print(f"held-out Python, {args.samples} windows of {args.length} tokens and {args.samples} next lines")
    print(f"{'':10s} {'bits a byte':>12s} {'edit similarity':>16s} {'exact lines':>12s}")
    for name, own in figures.items():
        print(f"{name:10s} {own.bits:12.3f} {own.similarity:16.1%} {own.exact:12.1%}")
    if args.json:
        args.json.write_text(json.dumps({name: asdict(own) for name, own in figures.items()}, indent=1) + "\n")
    model, baseline = figures.values()
    better = model.bits < baseline.bits and model.similarity > baseline.similarity
    print("the model wins" if better else "the model does not win: train longer or on more Python")
    raise SystemExit(not better)


if __name__ == "__main__":
    main()
