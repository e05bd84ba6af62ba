"""Retrieved documents in front of a question, in changing order: what a cache of prefixes is worth to them.

    python -m benchmarks.serving.rag [--documents 6] [--retrieved 3] [--tokens 700] [--queries 16] [--output FILE.json]
    python -m benchmarks.serving.rag --model models/kvjax_small
    python -m benchmarks.serving.rag --quick

Each query has `--retrieved` of the documents, in the order in which a retriever happens to rank them. KV is found by
prefix, so a document helps only where all before it is the same: a client that sorts what it retrieved (by name, say)
makes that happen more often. Every query is asked, alone, of three servers: without a store, with one and as ranked,
with another one and sorted. "Found" is the share of the prompts' tokens that was not computed, "same beginning" what
an earlier prompt began with, and "seen" what documents and the system prompt had in earlier prompts, wherever they
stood: what a cache that looks beyond prefixes could find.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common.quick import build_parser, parse, settings
from benchmarks.common.random_model import write_random_model
from benchmarks.common.report import write_rows
from benchmarks.common.words import Words
from benchmarks.serving.server import Answer, Client, add_server_flags, serving, shown, spread, store_flags

SYSTEM = {"role": "system", "content": "Answer from these documents."}
ROOM = 64  # tokens of a prompt beyond its documents and the question
NUMBERS = {
    "documents": (6, "there are"),
    "retrieved": (3, "of them in a prompt"),
    "tokens": (700, "of a document"),
    "queries": (16, "one after another"),
    "question": (32, "tokens of a question"),
    "answer": (16, "tokens of an answer"),
}
QUICK = {"documents": 3, "retrieved": 2, "tokens": 300, "queries": 3, "question": 8, "answer": 2}


def retrieved(args: argparse.Namespace) -> list[list[int]]:
    """The documents of each query, as ranked: any of them as likely as another."""
    random = np.random.default_rng(0)
    return [random.permutation(args.documents)[: args.retrieved].tolist() for _ in range(args.queries)]


def begins_alike(prompt: Sequence[int], earlier: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest beginning that a prompt has in common with an earlier one."""
    return max((common(prompt, other) for other in earlier), default=0)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    differ = (index for index, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(a), len(b)))


def seen(orders: Sequence[Sequence[int]]) -> int:
    """The count of documents, over all queries, that an earlier query had."""
    return sum(len(order) for order in orders) - len({document for order in orders for document in order})


def summarize(
    answers: Sequence[Answer], prompts: Sequence[Sequence[int]], orders: Sequence[Sequence[int]], tokens: int, head: int
) -> dict[str, Any]:
    """Figures of the client of one server.

    Args:
        prompts: their tokens.
        tokens: of a document; `head`: before the first document.
    """
    everything = sum(answer.prompt for answer in answers)
    alike = sum(begins_alike(prompt, prompts[:index]) for index, prompt in enumerate(prompts))
    return {
        "ttft_s": spread([answer.ttft for answer in answers]),
        "found": sum(answer.cached for answer in answers) / everything,
        "same_beginning": alike / everything,
        "seen": (seen(orders) * tokens + (len(orders) - 1) * head) / everything,
        "prompt_tokens": [min(answer.prompt for answer in answers), max(answer.prompt for answer in answers)],
    }


def measure(args: argparse.Namespace, place: pathlib.Path) -> dict[str, Any]:
    longest = args.retrieved * args.tokens + args.question + args.answer + ROOM
    model = args.model or place / "model"
    if args.model is None:
        write_random_model(model, longest, toy=args.quick)
    words = Words(model)
    texts = [words.text(args.tokens, document) for document in range(args.documents)]
    ranked = retrieved(args)
    orders = {"without": ranked, "as ranked": ranked, "sorted": [sorted(order) for order in ranked]}
    with contextlib.ExitStack() as stack:
        clients = {}
        for name in orders:
            flags = ("--host-cache-size", "0") if name == "without" else store_flags(args, place / f"kv {name}")
            flags = ("--max-model-len", str(longest), "--max-num-seqs", "1", *flags)
            clients[name] = stack.enter_context(Client(stack.enter_context(serving(model, place / name, *flags))))
        answers: dict[str, list[Answer]] = {name: [] for name in orders}
        prompts: dict[str, list[list[int]]] = {name: [] for name in orders}
        for query in range(args.queries):
            question = words.text(args.question, args.documents, query)
            for name, client in clients.items():
                content = "\n\n".join([*(texts[document] for document in orders[name][query]), question])
                messages = [SYSTEM, {"role": "user", "content": content}]
                answers[name].append(client.ask(messages, args.answer))
                prompts[name].append(words.tokens(messages))
        head = common(words.tokens([SYSTEM, {"role": "user", "content": ""}]), prompts["as ranked"][0])
        return {
            name: summarize(answers[name], prompts[name], orders[name], args.tokens, head)
            | {"sources": client.sources()}
            for name, client in clients.items()
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser("benchmarks.serving.rag", __doc__, NUMBERS)
    add_server_flags(parser)
    args = parse(parser, arguments, QUICK)
    if args.retrieved > args.documents:
        parser.error(f"--retrieved {args.retrieved} is more than the {args.documents} documents that there are")
    with tempfile.TemporaryDirectory() as place:
        row = measure(args, pathlib.Path(place))
    print(f"{args.queries} queries, each with {args.retrieved} of {args.documents} documents of {args.tokens:,} tokens")
    for name, arm in row.items():
        print(f"{name:<10} {shown(arm['ttft_s'], arm['sources'])}")
    for name, arm in list(row.items())[1:]:
        print(
            f"{name:<10} found {arm['found']:.0%} of the prompts; the same beginning as an earlier one "
            f"{arm['same_beginning']:.0%}; seen in any place {arm['seen']:.0%}"
        )
    if args.output:
        write_rows(args.output, "benchmarks.serving.rag", [row], settings(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
