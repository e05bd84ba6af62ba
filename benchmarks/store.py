"""The KV store against computing everything, and its tiers against what the machine can do.

    python -m benchmarks.store [--parts tiers device warm curve documents overhead restart again together]
                               [--model MODEL] [--output FILE.json]
    python -m benchmarks.store --quick

The model has the shape of that of `benchmarks.foundation`, with random weights; `again` and `together` ask one as it is
served (`--model`). TTFT is that of one request alone,
through the engine. On a CPU computing is over a hundred times slower than loading, so a raw ratio says nothing of other
machines: `curve` and `documents` hold the tier back to r times the speed of computing. A part is written to the output
when it is done: the same command again goes on where it was stopped. Conversations and retrieved documents, through a
server: `benchmarks.serving.multi_round_qa`, `benchmarks.serving.rag`.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.quick import parse
from benchmarks.common.random_model import write_random_model
from benchmarks.common.report import former_rows, write_rows
from benchmarks.restore import device
from benchmarks.store_again import again
from benchmarks.store_engine import (
    ONE,
    Plan,
    cpu_of_store,
    engine_on,
    forget_host,
    in_pairs,
    in_turns,
    more,
    prompt,
    settle,
    step_of,
    store_of,
    ttft,
)
from benchmarks.store_together import together
from kvjax.models import catalog
from kvjax.store.config import StoreConfig
from kvjax.store.disk import DiskTier
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.opening import open_store
from kvjax.store.tier import Stored, Tier


class HeldBack(Tier):
    """Objects in memory that take so long to come as a device would that reads `seconds` a block, one at a time.

    Args:
        name: a planner knows the rate of each name, so a new one is a tier that was never measured.
    """

    def __init__(self, seconds: float, name: str = "remote") -> None:
        self.seconds, self.name = seconds, name
        self._objects: dict[str, bytes] = {}
        self._line = threading.Lock()

    def read(self, key: str, into: memoryview) -> bool:
        blob = self._objects.get(key)
        if blob is None:
            return False
        with self._line:
            began = time.perf_counter()
            into[:] = blob
            time.sleep(max(self.seconds - (time.perf_counter() - began), 0.0))
        return True

    def write(self, key: str, blob: memoryview, parent: str = "") -> None:
        self._objects[key] = bytes(blob)

    def contains(self, key: str) -> bool:
        return key in self._objects

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)

    def scan(self) -> Iterator[Stored]:
        return iter([Stored(key, len(blob)) for key, blob in self._objects.items()])


def tiers(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Reads of the disk tier against `preadv` of the same files, all into one warm buffer, in turns."""
    size, count = plan.object, plan.objects
    tier = DiskTier(folder, 1 << 40, least_free=0)
    blob = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    keys = [f"{number:064x}" for number in range(count)]
    for key in keys:
        tier.write(key, memoryview(blob))
    buffer = np.zeros(size, np.uint8)
    buffer[:] = 1
    paths = [next((folder / "kvjax-kv-2").glob(f"*/{key}")) for key in keys]

    def plain() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            os.preadv(file, [memoryview(buffer)], 0)
            os.close(file)

    def through_tier() -> None:
        for key in keys:
            assert tier.read(key, memoryview(buffer))

    best = in_turns({"preadv": plain, "disk tier": through_tier}, plan.rounds, size * count)
    share = best["disk tier"] / best["preadv"]
    print(f"tiers     preadv {best['preadv']:.2f} GB/s, disk tier {best['disk tier']:.2f} GB/s: {share:.2f} of it")
    tier.close()
    return {"gigabytes_per_second": best, "share": share}


def warm(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """TTFT from nothing, from host memory and from the disk."""
    rows = []
    store = StoreConfig(
        host_cache_size=plan.host, disk_cache=folder, disk_cache_size=64 << 30, prefetch_policy="wait_complete"
    )
    for length in plan.lengths:
        with engine_on(plan.model, length + 64, store) as engine:
            tokens = prompt(length, seed=length)
            cold, _ = ttft(engine, tokens)
            host = [ttft(engine, tokens) for _ in range(plan.rounds)]
            disk = []
            for _ in range(plan.rounds):
                forget_host(engine)
                disk.append(ttft(engine, tokens))
            step = step_of(engine)
        row = {
            "tokens": length,
            "step": step,
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


def curve(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """TTFT over how much faster than computing a tier is, against computing everything."""
    length, rows = plan.lengths[0], []
    with engine_on(
        plan.model, length + 64, StoreConfig(host_cache_size=plan.host, prefetch_policy="wait_complete")
    ) as engine:
        store = store_of(engine)
        cold = [ttft(engine, prompt(length, seed)) for seed in range(3)]
        compute = statistics.median(seconds for seconds, _ in cold)
        for ratio in plan.ratios:
            forget_host(engine)
            store.replace_tiers([HeldBack(compute / (length / BLOCK_TOKENS) / ratio, f"remote at {ratio}")])
            ttft(engine, prompt(length, seed=99))
            forget_host(engine)
            learning, _ = ttft(engine, prompt(length, seed=99))
            taken, base = [], []
            for turn in range(2 * plan.rounds + 2):
                forget_host(engine)
                taken.append(ttft(engine, prompt(length, seed=99)))
                base.append(ttft(engine, prompt(length, seed=1000 + 100 * turn + int(10 * ratio))))
            seconds, alone = (statistics.median(each for each, _ in arm[1:]) for arm in (taken, base))
            row = {
                "r": ratio,
                "ttft_s": seconds,
                "recompute_s": alone,
                "share": in_pairs([each for each, _ in taken[1:]], [each for each, _ in base[1:]]),
                "first_s": learning,
                "cached": taken[-1][1],
            }
            rows.append(row)
            print(
                f"curve     r = {ratio:4}: TTFT {seconds:.2f} s, computed {alone:.2f} s, {row['share']:.2f} of it; "
                f"{row['cached']:,} of {length:,} tokens found; {learning:.2f} s when the tier was new"
            )
    return {"tokens": length, "rows": rows}


def documents(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """LMCache's long-doc-qa: a warm-up round over all documents, then questions in tile order; r is about 10."""
    length, count, rounds = plan.lengths[len(plan.lengths) // 2], plan.documents, 2
    texts = [[100 + index, *prompt(length - 1, seed=index)] for index in range(count)]
    result: dict[str, Any] = {"tokens": length, "documents": count, "rounds": rounds}
    for name in ("without", "with"):
        config = StoreConfig(host_cache_size=plan.host, prefetch_policy="wait_complete") if name == "with" else None
        with engine_on(plan.model, length + 128, config) as engine:
            far = HeldBack(0.0)
            if name == "with":
                store_of(engine).replace_tiers([far])
            first = [ttft(engine, text)[0] for text in texts]
            far.seconds = statistics.median(first) / (length / BLOCK_TOKENS) / 10
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


def overhead(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """What storing costs a run of prompts, one right after another, of which nothing is found.

    With host memory alone, and with a disk below it. Where the cores that compute also store, the CPU that this takes
    is what it costs; the clock says the same, but on most machines it wanders by more from one run to the next.
    """
    length, run = plan.lengths[0], 4
    host = StoreConfig(host_cache_size=plan.host)
    arms = {
        "without": None,
        "host": host,
        "disk": dataclasses.replace(host, disk_cache=folder, disk_cache_size=64 << 30),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    storing: dict[str, list[float]] = {name: [] for name in arms}  # as a share of all CPU
    with contextlib.ExitStack() as opened:
        engines = {
            name: opened.enter_context(engine_on(plan.model, length + 64, store)) for name, store in arms.items()
        }
        order = list(arms)
        for turn in range(4 * plan.rounds + 1):  # the first one compiles
            for name in order:
                began, before, store_cpu = time.perf_counter(), time.process_time(), cpu_of_store()
                for number in range(run):
                    engines[name].generate([prompt(length, seed=run * turn + number)], ONE, progress=False)
                seconds[name].append(time.perf_counter() - began)
                settle(engines[name])
                storing[name].append((cpu_of_store() - store_cpu) / (time.process_time() - before))
            order.append(order.pop(0))  # none always comes after the one that writes most
        written = store_of(engines["disk"]).layout.nbytes * run * (length // BLOCK_TOKENS)
    shares = {name: more(seconds[name][1:], seconds["without"][1:]) for name in ("host", "disk")}
    cpu = {name: statistics.median(storing[name][1:]) for name in ("host", "disk")}
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    described = {
        name: f"{100 * cpu[name]:.1f}% of the CPU, {100 * share:+.1f} ± {100 * error:.1f}% by the clock"
        for name, (share, error) in shares.items()
    }
    print(
        f"overhead  {run} prompts of {length:,} tokens, {median['without']:.2f} s without a store; storing "
        f"{written >> 20} MiB takes in host memory {described['host']}; on a disk too {described['disk']}"
    )
    return {
        "tokens": length,
        "prompts": run,
        "bytes": written,
        "seconds": median,
        "clock_more": {name: {"mean": share, "standard_error": error} for name, (share, error) in shares.items()},
        "cpu_share": cpu,
    }


def restart(plan: Plan, folder: pathlib.Path) -> dict[str, Any]:
    """Opening a folder of many blocks, and the first old conversation."""
    length = plan.lengths[0]
    store = StoreConfig(
        host_cache_size=plan.host, disk_cache=folder, disk_cache_size=1 << 40, prefetch_policy="wait_complete"
    )
    with engine_on(plan.model, length + 64, store) as engine:
        cold, _ = ttft(engine, prompt(length, seed=7))
        engine.drain(60.0)
        layout = store_of(engine).layout
    for number in range(plan.blocks - len(list((folder / "kvjax-kv-2").glob("*/" + "?" * 64)))):
        key = f"{number % 256:02x}{number:062x}"
        (folder / "kvjax-kv-2" / key[:2] / key).write_bytes(b"x")
    began = time.perf_counter()
    open_store(layout, store).close()
    opened, began = time.perf_counter() - began, time.perf_counter()
    with engine_on(plan.model, length + 64, store) as engine:
        ready = time.perf_counter() - began
        first, cached = ttft(engine, prompt(length, seed=7))
    print(
        f"restart   {plan.blocks:,} blocks: ready after {ready:.1f} s; a store alone opens in {opened:.2f} s; the "
        f"first old conversation of {length:,} tokens has its first token after {first:.3f} s ({cached:,} tokens "
        f"found), {cold:.2f} s before"
    )
    return {"tokens": length, "ready_s": ready, "store_s": opened, "ttft_s": first, "cold_s": cold, "cached": cached}


PARTS: Mapping[str, Callable[[Plan, pathlib.Path], dict[str, Any]]] = {
    part.__name__: part for part in (tiers, device, warm, curve, documents, overhead, restart, again, together)
}


def served(model: str | None, quick: bool) -> str | None:
    """Folder or file of a model by name or path, or of the default one; None where a random one takes its place.

    Raises:
        FileNotFoundError: a model of the catalog is not on this machine; says how to get it.
    """
    known = catalog.DEFAULT if model is None else catalog.known(model)
    located = model if known is None else known.locate()
    if model is None and (quick or located is None):
        return None
    if located is None:
        raise FileNotFoundError(f"{model} is not on this machine: {known.source if known else ''}")
    return str(located)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the parts that `--output` does not hold yet; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.store", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 16384], help="tokens of prompts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help=f"of `again`, `together` (default: {catalog.DEFAULT.name}, if it is here)")
    args = parse(parser, arguments, {"lengths": [1536], "rounds": 1})
    settings = {"lengths": args.lengths, "rounds": args.rounds, "model": args.model, "quick": args.quick}
    try:
        rows = former_rows(args.output, settings) if args.output else []
        model = served(args.model, args.quick)
    except (ValueError, FileNotFoundError) as error:
        print(f"benchmarks.store: {error}", file=sys.stderr)
        return 2
    known = {row["part"] for row in rows}
    for part in [part for part in args.parts if part in known]:
        print(f"{part:<9} is in {args.output} already")
    with tempfile.TemporaryDirectory() as place:
        plan = Plan(random := str(pathlib.Path(place) / "model"), tuple(args.lengths), args.rounds)
        plan = dataclasses.replace(plan, served=model or random)
        plan = plan.toy() if args.quick else plan
        write_random_model(plan.model, max(plan.lengths) + 256, toy=args.quick)
        for part in args.parts:
            if part in known:
                continue
            folder = pathlib.Path(place) / part
            folder.mkdir()
            began = time.monotonic()
            result = PARTS[part](plan, folder)
            shutil.rmtree(folder)  # the next part has the disk for itself
            rows.append({"part": part, "seconds_in_all": round(time.monotonic() - began, 1), **result})
            if args.output:
                write_rows(args.output, "benchmarks.store", rows, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
