"""Figure of an estimate: memory of the device, bytes that a step reads, and loading against computing."""

import itertools
from pathlib import Path
from typing import Any

from kvjax.plan.estimate import Estimate
from kvjax.plan.render import columns, label, show_rate, show_seconds, title

INK, LIMIT = "#263238", "#d7301f"
# told apart by luminance too
PARTS = {"weights": "#1f3a57", "views": "#5b8db8", "page summaries": "#f2b134", "workspaces": "#a9c6de"}
REST, REST_COLOUR = "other", "#dfe5e8"
DASHES = {"host": "-", "disk": "--", "remote": ":"}
GIB = 1 << 30


def draw(name: str, result: Estimate, path: Path) -> None:
    """Writes the picture in the format that the file's name says.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--picture needs matplotlib: pip install matplotlib, or "kvjax[search]"') from error
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title(name, result)}, {label(result)}", color=INK, fontweight="bold")
    memory, step, prefix = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    _memory(memory, result)
    _step(step, result)
    _prefix(prefix, result)
    figure.savefig(path, dpi=130)


def _memory(axes: Any, result: Estimate) -> None:
    deployment, engines = result.deployment, columns(result)
    for place, (_, engine) in enumerate(engines):
        named = {part: engine.memory[part] for part in PARTS}
        bars = named | {REST: engine.nbytes - sum(named.values())}
        base = 0.0
        for part, nbytes in bars.items():
            colour = PARTS.get(part, REST_COLOUR)
            axes.bar(place, nbytes / GIB, 0.6, base, color=colour, label=None if place else part)
            base += nbytes / GIB
        axes.text(place, base, f"{engine.most:,} fit", ha="center", va="bottom", fontsize="small", color=INK)
    limit = deployment.free / GIB
    axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"{deployment.share:.0%} of the device")
    _names(axes, result)
    axes.set_ylim(0, 1.12 * max(limit, *(engine.nbytes / GIB for _, engine in engines)))
    each = "the device" if deployment.device.parts == 1 else f"each of {deployment.device.parts} devices"
    axes.set(ylabel="GiB", title=f"memory of {each}")
    _legend(axes, "upper right" if result.compressed else "best")


def _step(axes: Any, result: Estimate) -> None:
    highest = 0.0
    for place, (_, engine) in enumerate(columns(result)):
        weights, kv = engine.step.weights / GIB, engine.step.kv / GIB
        axes.bar(place, weights, 0.6, color=PARTS["weights"], label=None if place else "weights")
        axes.bar(place, kv, 0.6, weights, color=PARTS["views"], label=None if place else "KV and summaries")
        highest = max(highest, weights + kv)
        time = f"{show_seconds(engine.step.seconds)} at least"
        axes.text(place, weights + kv, time, ha="center", va="bottom", fontsize="small", color=INK)
    _names(axes, result)
    axes.set_ylim(0, 1.12 * highest)
    axes.set(ylabel="GiB", title=f"read by a decode step, {show_rate(result.deployment.device.bandwidth)}")
    _legend(axes, "upper right" if result.compressed else "best")


def _prefix(axes: Any, result: Estimate) -> None:
    prefix = result.prefix
    axes.set_title("full KV of a prefix: load or compute")
    if not prefix.tokens:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "shorter than a chunk:\nalways computed", ha="center", transform=axes.transAxes, color=INK)
        return
    chunks = len(prefix.compute)
    tokens = [prefix.tokens * (index + 1) / chunks for index in range(chunks)]
    axes.plot(tokens, list(itertools.accumulate(prefix.compute)), color=LIMIT, linewidth=2.2, label="compute, roofline")
    for load in prefix.loads:
        times = [load.seconds * (index + 1) / chunks for index in range(chunks)]
        text = f"{load.tier}, {show_rate(load.bandwidth)}"
        axes.plot(tokens, times, color=PARTS["weights"], linestyle=DASHES[load.tier], label=text)
    axes.set(xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
    _legend(axes, "best")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _legend(axes: Any, place: str) -> None:
    """Opaque: the device's limit passes behind it."""
    axes.legend(fontsize="x-small", loc=place, edgecolor="none", framealpha=1)


def _names(axes: Any, result: Estimate) -> None:
    names = [name for name, _ in columns(result)]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
