"""A needle in 102,400 tokens, read through views that a decode step reads 256 of: the whole server, one request.

    python -m benchmarks.serving.long_context [--length 102400] [--token-budget 256] [--output FILE.json]

The model is the transformer with weights set by hand (`benchmarks.model_card.induction`): asked with a token, it says
what followed that token the last time. One pair of tokens lies at `--depth` of a random text that has neither of them,
and the prompt ends with the first. It is asked of a server with a budget, as any client would.
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile
import time
import urllib.request
from typing import Any

import numpy as np
import psutil

from benchmarks.common.report import write_report
from benchmarks.model_card.induction import Induction, write
from benchmarks.serving.server import NAME, serving

KEY, VALUE = 1, 2  # tokens that nothing else in the text is
NEW = 64


def prompt(length: int, depth: float, vocabulary: int) -> list[int]:
    """Random tokens with one needle, asked for at the end."""
    tokens = np.random.default_rng(0).integers(VALUE + 1, vocabulary, length)
    place = int(depth * (length - 3))
    tokens[place : place + 2], tokens[-1] = (KEY, VALUE), KEY
    return tokens.tolist()


def ask(port: int, tokens: list[int], count: int) -> tuple[float, float, list[str]]:
    """Seconds to the first token, seconds from it to the last, and the tokens."""
    body = {"model": NAME, "prompt": tokens, "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began, first, text = time.monotonic(), None, ""
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
            if chunk and first is None:
                first = time.monotonic()
            text += chunk
    assert first is not None, "the server sent no token"
    return first - began, time.monotonic() - first, re.findall(r"t\d+", text)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.serving.long_context", description=__doc__)
    parser.add_argument("--length", type=int, default=102_400)
    parser.add_argument("--token-budget", type=int, default=256)
    parser.add_argument("--depth", type=float, default=0.3)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    longest = -(-(args.length + NEW) // 512) * 512
    with tempfile.TemporaryDirectory() as folder:
        write(Induction(256, longest), pathlib.Path(folder))
        flags = ("--token-budget", str(args.token_budget), "--max-num-seqs", "1", "--host-cache-size", "0")
        with serving(folder, pathlib.Path(folder) / "log", *flags) as server:
            first, rest, tokens_out = ask(server.port, prompt(args.length, args.depth, 256), NEW)
            peak = psutil.Process(server.pid).memory_info().rss
        lines = server.log.read_text().splitlines()
    row: dict[str, Any] = {
        "tokens": args.length,
        "token_budget": args.token_budget,
        "found": bool(tokens_out) and tokens_out[0] == f"t{VALUE}",
        "ttft_s": round(first, 2),
        "decode_tokens_per_second": round((NEW - 1) / rest, 1),
        "process_bytes": peak,
        "keeps": next(line.split("keeps", 1)[1].strip() for line in lines if "keeps" in line),
        "log": next(line.split("INFO ", 1)[1] for line in lines if "TTFT" in line),
    }
    print(f"needle {'found' if row['found'] else 'LOST'}: {args.length:,} tokens at a budget of {args.token_budget}")
    print(row["keeps"])
    print(row["log"])
    if args.output:
        write_report(args.output, "python -m benchmarks.serving.long_context", [row], ("jax", "jaxlib"))
    sys.exit(0 if row["found"] else 1)


if __name__ == "__main__":
    main()
