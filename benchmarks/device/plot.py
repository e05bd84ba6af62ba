"""Plot of the results of `benchmarks.device`, with rooflines. Points that were not measured are hollow."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.device.model import FULL
from benchmarks.device.table import by_bytes, copy_rate, ratios
from kvjax.plan.devices import Device

INK, LIMIT = "#263238", "#d7301f"
COLOURS = ("#1f3a57", "#5b8db8", "#f2b134", "#7a9a3a", "#8e6c9e", "#d98c5f")  # told apart by luminance too
MARKS = ("o", "s", "^", "D", "v", "P")
TARGET = 0.8  # of the copy's bandwidth, what a kernel is to reach

Row = dict[str, Any]


def draw(rows: Sequence[Row], device: Device, path: pathlib.Path) -> None:
    """Writes the picture in the format that the file's name says.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install matplotlib, or "kvjax[search]"') from error
    rows = [row for row in rows if "skipped" not in row and "failed" not in row]
    picture = Figure(figsize=(12.5, 8.4), layout="constrained")
    FigureCanvasAgg(picture)
    seen = sorted({row["on"]["device"] for row in rows if "on" in row})
    picture.suptitle(f"{', '.join(seen) or device.name}: decode of a model with random weights", color=INK)
    panels: Sequence[tuple[Any, Callable[..., None]]] = list(
        zip(picture.subplots(2, 2).flat, (_steps, _ratios, _kernels, _host), strict=True)
    )
    for axes, panel in panels:
        panel(axes, rows, device)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(fontsize="x-small", edgecolor="none", framealpha=0.9)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=INK)
    picture.savefig(path, dpi=130)


def _steps(axes: Any, rows: Sequence[Row], device: Device) -> None:
    """A step by context at the batch of which there is most; rooflines are dashed lines of the same colour."""
    decode = [row for row in rows if row["part"] == "decode"]
    batch = _usual([row["batch"] for row in decode])
    axes.set_title(f"a decode step of {batch} conversations")
    arms = sorted({row["budget"] for row in decode}, key=lambda budget: budget or 0)
    for colour, mark, budget in zip(COLOURS, MARKS, arms, strict=False):
        points: dict[int, Row] = {}
        for row in decode:
            if (row["batch"], row["budget"]) == (batch, budget):
                other = points.get(row["context"])
                if other is None or _best(row) < _best(other):
                    points[row["context"]] = row
        contexts = sorted(points)
        name = FULL + ", the best arm" if budget is None else f"rocketkv {budget}"
        _dots(axes, contexts, [points[at] for at in contexts], colour, mark, name, 1e3)
        _roofline(axes, contexts, [1e3 * points[at]["roofline"] for at in contexts], colour)
    _contexts(axes, decode)
    axes.set(ylabel="ms (dashed: roofline)", yscale="log")


def _ratios(axes: Any, rows: Sequence[Row], device: Device) -> None:
    """Speed-up over the full cache's best arm."""
    speedups = ratios(rows)
    batch = _usual([ratio.batch for ratio in speedups])
    axes.set_title(f"full cache over RocketKV, {batch} conversations")
    budgets = sorted({ratio.budget for ratio in speedups})
    for colour, mark, budget in zip(COLOURS[1:], MARKS[1:], budgets, strict=False):
        line = sorted((r for r in speedups if (r.batch, r.budget) == (batch, budget)), key=lambda ratio: ratio.context)
        contexts = [ratio.context for ratio in line]
        _roofline(axes, contexts, [ratio.roofline for ratio in line], colour)
        for ratio in line:
            measured = ratio.measured is not None
            value = ratio.measured if measured else ratio.predicted
            axes.plot(
                ratio.context, value, mark, color=colour, fillstyle="full" if measured else "none",
                label=f"rocketkv {budget}" if ratio is line[0] else None,
            )  # fmt: skip
    _contexts(axes, [{"context": ratio.context} for ratio in speedups])
    axes.set(ylabel="times (dashed: roofline)")


def _kernels(axes: Any, rows: Sequence[Row], device: Device) -> None:
    """Share of the copy's bandwidth of each operation, by its best implementation, at the usual batch."""
    kernels = [row for row in rows if row["part"] == "kernels" and by_bytes(row, device)]
    batch = _usual([row["batch"] for row in kernels])
    axes.set_title(f"bandwidth of each operation, {batch} conversations")
    copy = copy_rate(rows) or device.bandwidth
    names = list(dict.fromkeys(row["operation"] for row in kernels))
    for colour, mark, name in zip(COLOURS, MARKS, names, strict=False):
        points: dict[int, Row] = {}
        for row in kernels:
            if (row["operation"], row["batch"]) == (name, batch):
                other = points.get(row["context"])
                if other is None or _best(row) < _best(other):
                    points[row["context"]] = row
        contexts = sorted(points)
        # the share of the copy is the inverse of the time, in units of what the bytes would take
        shares = [points[at]["bytes"] / _taken(points[at]) / copy for at in contexts]
        for at, share in zip(contexts, shares, strict=True):
            full = "full" if "measured" in points[at] else "none"
            axes.plot(at, share, mark, color=colour, fillstyle=full, label=name if at == contexts[0] else None)
        axes.plot(contexts, shares, color=colour, linewidth=0.8, alpha=0.6)
    axes.axhline(1, color=LIMIT, linewidth=1.2)
    axes.axhline(TARGET, color=LIMIT, linewidth=1, linestyle=":")
    _contexts(axes, kernels)
    axes.set(ylabel="of a copy's bandwidth (dotted: the aim)", ylim=(0, None))


def _host(axes: Any, rows: Sequence[Row], device: Device) -> None:
    """Cost of a dispatch: seconds of a step by the steps of a dispatch, captured or not."""
    host = [row for row in rows if row["part"] == "host"]
    axes.set_title("the host: steps of a dispatch")
    for colour, mark, captured in zip(COLOURS, MARKS, (True, False), strict=False):
        line = sorted((row for row in host if row["captured"] is captured), key=lambda row: row["decode_steps"])
        name = "command buffers " + ("as XLA has them" if captured else "off")
        _dots(axes, [row["decode_steps"] for row in line], line, colour, mark, name, 1e3)
    axes.set(xlabel="steps of a dispatch", ylabel="ms of a step")
    axes.set_ylim(0, 1.15e3 * max(map(_taken, host), default=1e-3))


def _dots(axes: Any, at: list[int], rows: Sequence[Row], colour: str, mark: str, name: str, factor: float) -> None:
    for index, (place, row) in enumerate(zip(at, rows, strict=True)):
        full = "full" if "measured" in row else "none"
        label = name if index == 0 else None
        axes.plot(place, factor * _taken(row), mark, color=colour, fillstyle=full, label=label)
    axes.plot(at, [factor * _taken(row) for row in rows], color=colour, linewidth=0.8, alpha=0.6)


def _roofline(axes: Any, at: Sequence[int], values: Sequence[float], colour: str) -> None:
    """A dashed line, that is seen where it has one point alone."""
    axes.plot(at, values, color=colour, linestyle="--", linewidth=1, marker="_", markersize=14)


def _contexts(axes: Any, rows: Sequence[Row]) -> None:
    ticks = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context")


def _best(row: Row) -> tuple[bool, float]:
    """Measured rows come before predicted ones."""
    return "measured" not in row, _taken(row)


def _taken(row: Row) -> float:
    return row["measured"]["seconds"] if "measured" in row else row["predicted"]


def _usual(batches: Sequence[int]) -> int:
    """8 where there is one, else the largest."""
    return 8 if 8 in batches else max(batches, default=0)
