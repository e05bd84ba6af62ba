"""The KV store against computing everything, and its tiers against what the machine can do.

    python -m benchmarks.store [--parts tiers warm curve documents overhead restart] [--output FILE.json]

The model has the shape of that of `benchmarks.foundation`, with random weights. TTFT is that of one request alone,
through the engine. On a CPU computing is over a hundred times slower than loading, so a raw ratio says nothing of other
machines: `curve` and `documents` hold the tier back to r times the speed of computing.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.foundation import write_tokenizer
from benchmarks.memory import make_model
from benchmarks.report import write_report
from kvjax import models
from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.keys import CHUNK
from kvjax.store.store import KVStore
from kvjax.store.tier import Stored, Tier

PARTS = ("tiers", "warm", "curve", "documents", "overhead", "restart")
RATIOS = (0.5, 1, 2, 5, 10, 50)
HOST = 3 << 30
ONE = SamplingParams(max_tokens=1, ignore_eos=True)


class HeldBack(Tier):
    """Objects in memory that take so long to come as a device would that reads `seconds` a chunk, one at a time."""

    name = "remote"

    def __init__(self, seconds: float) -> None:
        self.seconds, self._objects, self._line = seconds, {}, threading.Lock()

    def read(self, key: str, into: memoryview) -> bool:
        blob = self._objects.get(key)
        if blob is None:
            return False
        with self._line:
            began = time.perf_counter()
            into[:] = blob
            time.sleep(max(self.seconds - (time.perf_counter() - began), 0.0))
        return True

    def write(self, key: str, blob: memoryview) -> None:
        self._objects[key] = bytes(blob)

    def contains(self, key: str) -> bool:
        return key in self._objects

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)

    def scan(self) -> Iterator[Stored]:
        return iter([Stored(key, len(blob)) for key, blob in self._objects.items()])


@contextlib.contextmanager
def engine_on(model: str, context: int, store: StoreConfig | None) -> Iterator[Engine]:
    config = EngineConfig(max_model_len=context, max_num_seqs=1, store=store)
    with Engine.from_pretrained(model, config) as engine:
        yield engine


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(10, 30_000, length).tolist()


def ttft(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were not computed. What is new is stored after."""
    began = time.perf_counter()
    [answer] = engine.generate([tokens], ONE, progress=False)
    seconds = time.perf_counter() - began
    settle(engine)
    return seconds, answer.cached_tokens


def settle(engine: Engine) -> None:
    if engine._prefix is not None:
        engine._prefix.settle()
        engine._prefix.store.wait(600.0)


def store_of(engine: Engine) -> KVStore:
    assert engine._prefix is not None
    return engine._prefix.store


def forget_host(engine: Engine) -> None:
    """Only the tiers below hold anything now."""
    store = store_of(engine)
    with store.mutex:
        for slab in store._host.ready():
            store._host.discard(slab.key)


def tiers(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Reads of the disk tier against `preadv` of the same files, all into one warm buffer, in turns."""
    size, count = 16 << 20, 32
    tier = DiskTier(folder, 1 << 40, least_free=0)
    blob = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    keys = [f"{number:064x}" for number in range(count)]
    for key in keys:
        tier.write(key, memoryview(blob))
    buffer = np.zeros(size, np.uint8)
    buffer[:] = 1
    paths = [next((folder / "kvjax-kv-1").glob(f"*/{key}")) for key in keys]

    def plain() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            os.preadv(file, [memoryview(buffer)], 0)
            os.close(file)

    def ours() -> None:
        for key in keys:
            assert tier.read(key, memoryview(buffer))

    rates: dict[str, list[float]] = {"preadv": [], "disk tier": []}
    for _ in range(args.rounds + 1):
        for name, arm in (("preadv", plain), ("disk tier", ours)):
            began = time.perf_counter()
            arm()
            rates[name].append(size * count / (time.perf_counter() - began) / 1e9)
    best = {name: statistics.median(values[1:]) for name, values in rates.items()}
    share = best["disk tier"] / best["preadv"]
    print(f"tiers     preadv {best['preadv']:.2f} GB/s, disk tier {best['disk tier']:.2f} GB/s: {share:.2f} of it")
    tier.close()
    return {"gigabytes_per_second": best, "share": share}


def warm(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """TTFT from nothing, from host memory and from the disk."""
    rows = []
    store = StoreConfig(
        host_cache_size=HOST, disk_cache=folder, disk_cache_size=64 << 30, prefetch_policy="wait_complete"
    )
    for length in args.lengths:
        with engine_on(args.model, length + 64, store) as engine:
            tokens = prompt(length, seed=length)
            cold, _ = ttft(engine, tokens)
            host = [ttft(engine, tokens) for _ in range(args.rounds)]
            disk = []
            for _ in range(args.rounds):
                forget_host(engine)
                disk.append(ttft(engine, tokens))
        row = {
            "tokens": length,
            "cold_s": cold,
            "host_s": statistics.median(seconds for seconds, _ in host),
            "disk_s": statistics.median(seconds for seconds, _ in disk),
            "cached": (host[0][1], disk[-1][1]),
        }
        rows.append(row)
        print(
            f"warm      {length:6,} tokens: computed {cold:.2f} s, from host {row['host_s']:.3f} s, "
            f"from disk {row['disk_s']:.3f} s ({row['cached'][0]:,} tokens found)"
        )
    return {"rows": rows}


def curve(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """TTFT over how much faster than computing a tier is, against computing everything."""
    length, rows = args.lengths[0], []
    with engine_on(
        args.model, length + 64, StoreConfig(host_cache_size=HOST, prefetch_policy="wait_complete")
    ) as engine:
        store = store_of(engine)
        cold = [ttft(engine, prompt(length, seed)) for seed in range(3)]
        compute = statistics.median(seconds for seconds, _ in cold)
        forget_host(engine)
        for ratio in RATIOS:
            far = HeldBack(compute / (length / CHUNK) / ratio)
            store.below = (far,)
            store.planner._load.clear()
            ttft(engine, prompt(length, seed=99))
            taken, base = [], []
            for turn in range(args.rounds + 1):
                forget_host(engine)
                taken.append(ttft(engine, prompt(length, seed=99)))
                base.append(ttft(engine, prompt(length, seed=1000 + 100 * turn + int(10 * ratio))))
            seconds, alone = (statistics.median(each for each, _ in arm[1:]) for arm in (taken, base))
            row = {"r": ratio, "ttft_s": seconds, "recompute_s": alone, "first_s": taken[0][0], "cached": taken[-1][1]}
            rows.append(row)
            print(
                f"curve     r = {ratio:4}: TTFT {seconds:.2f} s of {alone:.2f} s, {seconds / alone:.2f}; "
                f"{row['cached']:,} of {length:,} tokens found"
            )
    return {"tokens": length, "rows": rows}


def documents(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """LMCache's long-doc-qa: a warm-up round over all documents, then questions in tile order; r is about 10."""
    length, count, rounds = args.lengths[0], 6, 2
    texts = [[100 + index, *prompt(length - 1, seed=index)] for index in range(count)]
    result: dict[str, Any] = {"tokens": length, "documents": count, "rounds": rounds}
    for name in ("without", "with"):
        config = StoreConfig(host_cache_size=HOST, prefetch_policy="wait_complete") if name == "with" else None
        with engine_on(args.model, length + 128, config) as engine:
            first = [ttft(engine, text)[0] for text in texts]
            if name == "with":
                far = HeldBack(statistics.median(first) / (length / CHUNK) / 10)
                store = store_of(engine)
                with store.mutex:
                    for slab in store._host.ready():
                        far.write(slab.key, memoryview(slab.blob))
                store.below = (far,)
            times, began = [], time.perf_counter()
            for turn in range(rounds):
                for text in texts:
                    if name == "with":
                        forget_host(engine)
                    times.append(ttft(engine, [*text, *prompt(32, seed=5000 + turn)])[0])
            result[name] = {"ttft_s": statistics.median(times), "round_s": (time.perf_counter() - began) / rounds}
    less = {key: 1 - result["with"][key] / result["without"][key] for key in ("ttft_s", "round_s")}
    result["less"] = less
    print(
        f"documents {count} x {length:,} tokens: TTFT {result['without']['ttft_s']:.2f} to "
        f"{result['with']['ttft_s']:.2f} s (-{100 * less['ttft_s']:.0f}%), round {result['without']['round_s']:.1f} to "
        f"{result['with']['round_s']:.1f} s (-{100 * less['round_s']:.0f}%)"
    )
    return result


def overhead(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """What storing costs prompts of which nothing is found."""
    length = args.lengths[0]
    store = StoreConfig(host_cache_size=HOST, disk_cache=folder, disk_cache_size=64 << 30)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with engine_on(args.model, length + 64, None) as bare, engine_on(args.model, length + 64, store) as stored:
        for turn in range(2 * args.rounds + 2):
            for name, engine in (("without", bare), ("with", stored)):
                seconds[name].append(ttft(engine, prompt(length, seed=turn))[0])
    median = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    share = median["with"] / median["without"] - 1
    print(f"overhead  {median['without']:.3f} s without a store, {median['with']:.3f} s with: {100 * share:+.1f}%")
    return {"seconds": median, "share": share}


def restart(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Opening a folder of 10,000 chunks, and the first old conversation."""
    length = args.lengths[0]
    store = StoreConfig(
        host_cache_size=HOST, disk_cache=folder, disk_cache_size=1 << 40, prefetch_policy="wait_complete"
    )
    with engine_on(args.model, length + 64, store) as engine:
        cold, _ = ttft(engine, prompt(length, seed=7))
        engine.drain(60.0)
    for number in range(10_000 - len(list((folder / "kvjax-kv-1").glob("*/" + "?" * 64)))):
        key = f"{number % 256:02x}{number:062x}"
        (folder / "kvjax-kv-1" / key[:2] / key).write_bytes(b"x")
    with engine_on(args.model, length + 64, store) as engine:
        opened = engine._seconds["store"]
        first, cached = ttft(engine, prompt(length, seed=7))
    print(
        f"restart   10,000 chunks: store open after {opened:.2f} s; the first old conversation of {length:,} tokens "
        f"has its first token after {first:.3f} s ({cached:,} tokens found), {cold:.2f} s before"
    )
    return {"store_s": opened, "ttft_s": first, "cold_s": cold, "cached": cached}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.store", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384], help="tokens of prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        args.model = str(pathlib.Path(place) / "model")
        models.save(models.random(make_model(max(args.lengths) + 256), jax.random.key(0)), args.model)
        write_tokenizer(args.model)
        for part in args.parts:
            folder = pathlib.Path(place) / part
            folder.mkdir()
            results[part] = globals()[part](args, folder)
    if args.output:
        command = "python -m benchmarks.store " + " ".join(sys.argv[1:])
        rows = [{"part": part, **found} for part, found in results.items()]
        write_report(args.output, command.strip(), rows, ("kvjax", "jax", "jaxlib", "tensorstore", "numpy"))


if __name__ == "__main__":
    main()
