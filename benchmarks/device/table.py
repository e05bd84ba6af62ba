"""Tables of `benchmarks.device` for the terminal: predictions beside measurements."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.device.copies import DEVICE_COPY
from benchmarks.device.model import FULL
from kvjax.plan.devices import Device
from kvjax.plan.render import show_rate
from kvjax.store.sizes import show_size

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The full cache's seconds of a step over RocketKV's.

    Attributes:
        arm: the best of the full cache's.
        roofline: by bytes alone; `predicted` before it was measured; `measured` None until both are.
    """

    batch: int
    context: int
    budget: int
    arm: str
    roofline: float
    predicted: float
    measured: float | None

    def __str__(self) -> str:
        measured_text = "-"
        if self.measured is not None:
            measured_text = f"{self.measured:.2f}x, {self.measured / self.roofline:.0%} of the roofline's"
        return (
            f"{self.context:7,} x {self.batch:<2}  rocketkv {self.budget:<5} against full {self.arm:<10} "
            f"roofline {self.roofline:5.2f}x  predicted {self.predicted:5.2f}x  measured {measured_text}"
        )


def copy_rate(rows: Iterable[Row]) -> float | None:
    """Bytes a second that a copy on the device moves, if that was measured."""
    return next((_rate(row) for row in rows if row["name"] == DEVICE_COPY and "measured" in row), None)


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """For each size and budget RocketKV's best arm against the full cache's best one."""
    decode = [row for row in rows if row["part"] == "decode" and "skipped" not in row and "failed" not in row]
    ratios: list[Ratio] = []
    for row in decode:
        size = row["batch"], row["context"]
        if row["budget"] is None or (*size, row["budget"]) in {(one.batch, one.context, one.budget) for one in ratios}:
            continue
        same = [other for other in decode if (other["batch"], other["context"]) == size]
        full = [other for other in same if other["arm"] == FULL]
        compressed = [other for other in same if other["budget"] == row["budget"]]
        if not full:
            continue
        timed = all(any("measured" in each for each in side) for side in (full, compressed))
        key = _seconds if timed else _predicted
        best, compressed_best = min(full, key=key), min(compressed, key=key)
        ratios.append(
            Ratio(
                *size,
                row["budget"],
                best["implementation"],
                best["roofline"] / row["roofline"],
                min(map(_predicted, full)) / min(map(_predicted, compressed)),
                _seconds(best) / _seconds(compressed_best) if timed else None,
            )
        )
    return ratios


def choosing(rows: Sequence[Row]) -> list[str]:
    """Scores and choice of pages against the attention that they save, at each size at which all are measured."""
    lines, best = [], {}
    for row in rows:
        if row["part"] == "kernels" and "measured" in row:
            key = row["operation"], row["batch"], row["context"]
            best[key] = min(best.get(key, float("inf")), row["measured"]["seconds"])
    for operation, batch, context in [key for key in best if key[0] == "selected_attention"]:
        parts = ("page_scores", "page_selection", "decode_attention")
        if all((part, batch, context) in best for part in parts):
            scores, choice, dense = (best[part, batch, context] for part in parts)
            saved = dense - best[operation, batch, context]
            lines.append(
                f"{context:7,} x {batch:<2}  scores {show_time(scores)} and choice {show_time(choice)} of pages save "
                f"{show_time(saved)} of attention: they take {(scores + choice) / saved:.2f} of that"
            )
    return lines


def by_bytes(row: Row, device: Device) -> bool:
    """Whether its bytes take a device longer than its arithmetic."""
    return row["bytes"] / device.bandwidth >= row.get("operations", 0) / device.flops


def show_time(seconds: float) -> str:
    """`3.42 us`, `3.42 ms`, `25.1 s`."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def savings(rows: Sequence[Row]) -> list[str]:
    """The share of the full cache's memory that RocketKV saves, predicted and measured."""
    by_full = {row["arm"] == FULL: row for row in rows if row["part"] == "memory" and "skipped" not in row}
    if len(by_full) < 2:
        return []
    full, compressed = by_full[True], by_full[False]
    taken, whole = compressed["predicted_bytes"], full["predicted_bytes"]
    text = f"{compressed['context']:7,} x {compressed['batch']:<2}  {compressed['arm']} takes {show_size(taken)} of "
    text += f"{show_size(whole)}, {1 - taken / whole:.0%} less"
    peaks = [row.get("measured", {}).get("peak") for row in (compressed, full)]
    if all(peaks):
        text += f"  measured {show_size(peaks[0])} of {show_size(peaks[1])}, {1 - peaks[0] / peaks[1]:.0%} less"
    return [text + ("" if all(peaks) else "  measured -")]


def line(row: Row, copy: float | None, device: Device) -> str:
    """One row. Shares are of the measured copy; before there is one, of what the maker says, which `*` marks."""
    name = f"{row['name']:<58}"
    if "skipped" in row:
        return f"{name} skipped: {row['skipped']}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    measured = row.get("measured")
    if row["part"] == "correctness":
        return f"{name} {_correct(measured)}"
    if row["part"] == "memory":
        measured_text = "-" if measured is None else show_size(measured["peak"] or measured["alive"])
        return f"{name} predicted {show_size(row['predicted_bytes']):>10}  measured {measured_text}"
    prefix = f"{name} predicted {show_time(row['predicted']):>8}"
    if measured is None:
        return f"{prefix}  measured -"
    text = f"{prefix}  measured {show_time(measured['seconds']):>8}"
    if not by_bytes(row, device):
        text += f"  {row['operations'] / measured['seconds'] / 1e12:7.1f} TFLOP/s"
    elif row["bytes"]:
        text += f"  {show_rate(_rate(row)):>10}  "
        if "host" in row.get("copy", ""):
            text += f"{_rate(row) / device.chip.host_link:4.0%} of the link"
        else:
            text += f"{_rate(row) / (copy or device.bandwidth):4.0%}{'' if copy else '*'}"
    if "tokens_per_second" in measured:
        text += f"  {measured['tokens_per_second']:9,.1f} tok/s"
    return text + (f"  WRONG: {row['marked']}" if "marked" in row else "")


def _correct(measured: Row | None) -> str:
    if measured is None:
        return "not compared yet"
    error = "no number" if measured["error"] is None else f"largest error {measured['error']:.1e}"
    verdict = "WRONG" if measured["wrong"] else "right"
    missing = len(measured["cases"]) - measured["served"]
    return f"{verdict}: {measured['served']} cases, {error}" + (f", {missing} not served" if missing else "")


def _rate(row: Row) -> float:
    return row["bytes"] / row["measured"]["seconds"]


def _seconds(row: Row) -> float:
    return row["measured"]["seconds"] if "measured" in row else float("inf")


def _predicted(row: Row) -> float:
    return row["predicted"]
