"""Conversations: users who share a system prompt and ask again and again, LMCache's multi-round-qa.

    python -m benchmarks.serving.multi_round_qa [--users 4] [--rounds 5] [--qps 0.5] [--output FILE.json]
    python -m benchmarks.serving.multi_round_qa --model models/kvjax_small
    python -m benchmarks.serving.multi_round_qa --quick

Each user brings a history of his own and asks `--rounds` questions; the conversation so far comes with each. The
n-th request of all is due n / qps seconds after the first (0: at once), and never before its user has read his last
answer. Two servers do the same, one without a store and one with, in turn; TTFT is what the clients see, from asking
on. A round is from its first question to its last answer.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.common.quick import build_parser, parse, settings
from benchmarks.common.random_model import write_random_model
from benchmarks.common.report import write_rows
from benchmarks.common.words import Words
from benchmarks.serving.server import Answer, Client, add_server_flags, serving, shown, spread, store_flags

TEMPLATE = 16  # most tokens that a chat template puts around a message
NUMBERS = {
    "users": (4, "who talk at once"),
    "rounds": (5, "questions of each"),
    "system": (1100, "tokens of the shared system prompt"),
    "history": (900, "tokens that a user brings"),
    "question": (100, "tokens of a question"),
    "answer": (32, "tokens of an answer"),
    "repeats": (1, "of the whole, with other texts, the servers in turn"),
}
QUICK = {"users": 2, "rounds": 2, "qps": 0.0, "system": 600, "history": 100, "question": 20, "answer": 4}


def converse(client: Client, words: Words, args: argparse.Namespace, repeat: int) -> list[list[Answer]]:
    """The answers of one workload, round by round. Every repeat has texts of its own, of which nothing is stored."""
    system, began = words.text(args.system, repeat), time.perf_counter()

    def user(number: int) -> list[Answer]:
        messages = [{"role": "system", "content": system}]
        answers: list[Answer] = []
        for turn in range(args.rounds):
            question = words.text(args.question, repeat, number, turn)
            if not turn:
                question = f"{words.text(args.history, repeat, number)} {question}"
            messages.append({"role": "user", "content": question})
            if args.qps:
                due = began + (turn * args.users + number) / args.qps
                time.sleep(max(due - time.perf_counter(), 0.0))
            answers.append(client.ask(messages, args.answer))
            messages.append({"role": "assistant", "content": answers[-1].text})
        return answers

    with ThreadPoolExecutor(args.users) as pool:
        return [list(answers) for answers in zip(*pool.map(user, range(args.users)), strict=True)]


def summarize(workloads: Sequence[Sequence[Sequence[Answer]]]) -> dict[str, Any]:
    """Figures of the clients of one server, over all repeats of the workload."""
    rounds = [each for workload in workloads for each in workload]
    answers = [answer for each in rounds for answer in each]
    seconds = sum(took([answer for each in workload for answer in each]) for workload in workloads)
    return {
        "ttft_s": spread([answer.ttft for answer in answers]),
        "ttft_by_round_s": [
            spread([answer.ttft for each in same for answer in each])["mean"] for same in zip(*workloads, strict=True)
        ],
        "round_s": sum(took(each) for each in rounds) / len(rounds),
        "generated_per_second": sum(answer.generated for answer in answers) / seconds,
        "prompt_tokens": [min(answer.prompt for answer in answers), max(answer.prompt for answer in answers)],
        "cached": sum(answer.cached for answer in answers) / sum(answer.prompt for answer in answers),
    }


def took(answers: Sequence[Answer]) -> float:
    return max(answer.last for answer in answers) - min(answer.sent for answer in answers)


def measure(args: argparse.Namespace, place: pathlib.Path) -> dict[str, Any]:
    turns = 2 * args.rounds + 1
    longest = args.system + args.history + args.rounds * (args.question + args.answer) + turns * TEMPLATE
    model = args.model or place / "model"
    if args.model is None:
        write_random_model(model, longest, toy=args.quick)
    words = Words(model)
    common = ("--max-model-len", str(longest), "--max-num-seqs", str(min(args.users, 8)))
    arms = {"without": ("--host-cache-size", "0"), "with": store_flags(args, place / "kv")}
    with contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(Client(stack.enter_context(serving(model, place / name, *common, *flags))))
            for name, flags in arms.items()
        }
        workloads_by_arm: dict[str, list[list[list[Answer]]]] = {name: [] for name in arms}
        for repeat in range(args.repeats):
            for name, client in clients.items():
                workloads_by_arm[name].append(converse(client, words, args, repeat))
        row: dict[str, Any] = {
            name: summarize(workloads_by_arm[name]) | {"sources": client.sources()} for name, client in clients.items()
        }
    texts = [
        [answer.text for workload in workloads_by_arm[name] for each in workload for answer in each] for name in arms
    ]
    row["answers"], row["same_answers"] = len(texts[0]), sum(a == b for a, b in zip(*texts, strict=True))
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser("benchmarks.serving.multi_round_qa", __doc__, NUMBERS)
    parser.add_argument("--qps", type=float, default=0.5, help="requests a second of all users together; 0: no pause")
    add_server_flags(parser)
    args = parse(parser, arguments, QUICK)
    with tempfile.TemporaryDirectory() as place:
        row = measure(args, pathlib.Path(place))
    shortest, longest = row["with"]["prompt_tokens"]
    print(
        f"{args.users} users x {args.rounds} rounds x {args.repeats}, {args.qps:g} requests/s, "
        f"prompts of {shortest:,} to {longest:,} tokens, answers of {args.answer}"
    )
    for name in ("without", "with"):
        arm = row[name]
        print(
            f"{name:<8} {shown(arm['ttft_s'], arm['sources'])} | round {arm['round_s']:.2f} s | "
            f"{arm['generated_per_second']:.1f} tok/s generated"
        )
    print(f"{row['same_answers']} of {row['answers']} answers are the same")
    if args.output:
        write_rows(args.output, "benchmarks.serving.multi_round_qa", [row], settings(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
