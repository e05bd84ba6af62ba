"""Measurements on an accelerator: correctness and speed of every kernel, and decode steps of a whole model.

    python -m benchmarks.device --output FILE.json [--parts ...] [--budget-seconds 540] [--predict] [--plot FILE.png]
    python -m benchmarks.device --quick

The prediction of each point is written to the file before anything is measured, from `kvjax.plan`'s rooflines and
the assumptions in `benchmarks/device/point.py`; `--predict` stops there, and runs anywhere for `--device h200`. A point
is written when it is done, so that the same command goes on where it was stopped; what matters most comes first. The
exit status is 0 when all is done, 75 when points are left (call it again), 1 when a kernel is wrong or a point has
failed, 2 for arguments that do not fit.
"""

import argparse
import gc
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence

# before JAX is imported: three quarters, as it would take, do not hold what is measured
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from benchmarks.common.quick import parse
from benchmarks.device import copies, correctness, kernels, model, prefill
from benchmarks.device.point import Point
from benchmarks.device.record import Record, is_wrong
from benchmarks.device.rig import Rig, device_name
from benchmarks.device.table import choosing, copy_rate, line, ratios, savings
from kvjax.plan.devices import CHIPS, find_device

LEFT = 75  # EX_TEMPFAIL of sysexits.h
FIRST = 45.0  # seconds that a point may take of which none was measured before: it compiles
PARTS: Mapping[str, Callable[[Rig], list[Point]]] = {
    "copies": copies.points,
    "correctness": correctness.points,
    "memory": prefill.memory_points,
    "kernels": kernels.points,
    "decode": model.points,
    "host": model.host_points,
    "prefill": prefill.points,
}
QUICK = {"batches": [2], "contexts": [512], "budgets": [128], "rounds": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the file does not hold yet; returns the exit status."""
    args = parse(_parser(), arguments, QUICK)
    try:
        rig = _rig(args)
        flags = os.environ.get("XLA_FLAGS", "")
        record = Record(args.output, {"device": rig.device.name, "quick": rig.quick, "xla_flags": flags})
        here = jax.devices()[0].device_kind
        if others := record.devices() - {here}:
            other = ", ".join(others)
            raise ValueError(f"{args.output} holds figures of {other}, and this is {here}: choose another --output")
        if not (args.predict or args.plot or rig.quick) and device_name() != rig.device.name:
            raise ValueError(f"JAX runs on {here}, which is no {rig.device.name}: --predict and --quick run here")
    except ValueError as error:
        print(f"benchmarks.device: {error}", file=sys.stderr)
        return 2
    points = sorted((point for part in args.parts for point in PARTS[part](rig)), key=lambda point: point.order)
    left = 0
    if not args.plot:
        record.expect(points)
    if not (args.predict or args.plot):
        if args.retry:
            record.again()
        left = measure(rig, record, points, here, args.budget_seconds)
    _show(record, rig, args.parts, everything=args.predict)
    if args.plot:
        from benchmarks.device.plot import draw

        draw(record.rows, rig.device, args.plot)
    if left:
        print(f"{left} points are left: the same command goes on")
        return LEFT
    return int(not args.predict and any("failed" in row or is_wrong(row) for row in record.rows))


def measure(rig: Rig, record: Record, points: Sequence[Point], here: str, budget: float) -> int:
    """Measures points in their order until so many seconds have passed. Returns how many are left."""
    began = time.monotonic()
    longest = record.longest()
    waiting = [point for point in points if record.open(point)]
    for index, point in enumerate(waiting):
        needed = longest.get(point.part, 0.0 if rig.quick else FIRST)
        if time.monotonic() - began + needed > budget:
            return len(waiting) - index
        record.begin(point)
        start = time.monotonic()
        outcome, lost = _outcome(point)
        took = time.monotonic() - start
        longest[point.part] = max(longest.get(point.part, 0.0), took)
        row = record.finish(point, outcome, here, took)
        print(line(row, copy_rate(record.rows), rig.device), flush=True)
        if lost:
            print("the device does not answer this process any more")
            return len(waiting) - index - 1
    return 0


def _outcome(point: Point) -> tuple[dict[str, object], bool]:
    """The outcome of a point, and whether this process has lost the device."""
    try:
        return {"measured": dict(point.measure())}, False
    except NotImplementedError as reason:
        return {"skipped": f"not served: {reason}"}, False
    except Exception as error:  # whatever it is, the other points are to be measured
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    gc.collect()  # the arrays of what failed
    try:
        jax.block_until_ready(jax.numpy.zeros(1) + 1)
    except Exception:
        return {"failed": message}, True
    return {"failed": message}, False


def _show(record: Record, rig: Rig, parts: Sequence[str], *, everything: bool) -> None:
    """Prints comparisons of rows; with `everything` each row too."""
    rows = [row for row in record.rows if row["part"] in parts]
    copy = copy_rate(record.rows)
    if everything:
        for row in rows:
            print(line(row, copy, rig.device))
    for title, lines in (
        ("full cache over RocketKV, a step", ratios(rows)),
        ("memory of a prefill and a step at their most", savings(rows)),
        ("page selection against the attention that it saves", choosing(rows)),
    ):
        if lines:
            print(f"\n{title}", *lines, sep="\n")
    if not copy and any("measured" in row for row in rows):
        print("\n* of the published bandwidth: no copy was measured")


def _rig(args: argparse.Namespace) -> Rig:
    name = args.device or device_name() or ("h200" if args.quick or args.predict or args.plot else None)
    if name is None:
        kind = jax.devices()[0].device_kind
        raise ValueError(
            f"JAX runs on {kind}, of which nothing is known: --quick or --predict, or one of {', '.join(CHIPS)}"
        )
    device = find_device(name)
    if device.chips != 1:
        raise ValueError(f"--device {name}: one chip is measured, not {device.chips}")
    sizes = [tuple(getattr(args, name)) for name in ("batches", "contexts", "budgets")]
    return Rig(device, args.quick, *sizes, args.rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), help="all by default")
    parser.add_argument("--device", metavar="NAME", help=f"by whose figures is predicted: {', '.join(CHIPS)}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16_384, 32_768, 65_536, 98_304, 131_072])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048], help="of RocketKV, in tokens")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many counts (default: %(default)s)")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), metavar="S", help="stop before so many")
    parser.add_argument("--predict", action="store_true", help="write and print what is expected; measure nothing")
    parser.add_argument("--retry", action="store_true", help="measure again what has failed")
    parser.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE.png", help="draw what the file holds; measure nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
