"""An estimate as one picture: what the device holds, what a step reads, and whether to load or to compute."""

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


def draw(name: str, answer: Estimate, path: Path) -> None:
    """Writes the picture in the format that the file's name says.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--picture needs matplotlib: pip install matplotlib, or "kvjax[search]"') from error
    picture = Figure(figsize=(12.5, 3.9), layout="constrained")
    FigureCanvasAgg(picture)
    picture.suptitle(f"{title(name, answer)}, {label(answer)}", color=INK, fontweight="bold")
    memory, step, prefix = picture.subplots(1, 3, width_ratios=(1, 1, 1.1))
    _memory(memory, answer)
    _step(step, answer)
    _prefix(prefix, answer)
    picture.savefig(path, dpi=130)


def _memory(axes: Any, answer: Estimate) -> None:
    question, sides = answer.question, columns(answer)
    for place, (_, side) in enumerate(sides):
        named = {part: side.memory[part] for part in PARTS}
        bars = named | {REST: side.nbytes - sum(named.values())}
        base = 0.0
        for part, nbytes in bars.items():
            colour = PARTS.get(part, REST_COLOUR)
            axes.bar(place, nbytes / GIB, 0.6, base, color=colour, label=None if place else part)
            base += nbytes / GIB
        axes.text(place, base, f"{side.most:,} fit", ha="center", va="bottom", fontsize="small", color=INK)
    limit = question.free / GIB
    axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"{question.share:.0%} of the device")
    _names(axes, answer)
    axes.set_ylim(0, 1.12 * max(limit, *(side.nbytes / GIB for _, side in sides)))
    each = "the device" if question.device.parts == 1 else f"each of {question.device.parts} devices"
    axes.set(ylabel="GiB", title=f"memory of {each}")
    _legend(axes, "upper right" if answer.this else "best")


def _step(axes: Any, answer: Estimate) -> None:
    highest = 0.0
    for place, (_, side) in enumerate(columns(answer)):
        weights, kv = side.step.weights / GIB, side.step.kv / GIB
        axes.bar(place, weights, 0.6, color=PARTS["weights"], label=None if place else "weights")
        axes.bar(place, kv, 0.6, weights, color=PARTS["views"], label=None if place else "KV and summaries")
        highest = max(highest, weights + kv)
        time = f"{show_seconds(side.step.seconds)} at least"
        axes.text(place, weights + kv, time, ha="center", va="bottom", fontsize="small", color=INK)
    _names(axes, answer)
    axes.set_ylim(0, 1.12 * highest)
    axes.set(ylabel="GiB", title=f"read by a decode step, {show_rate(answer.question.device.bandwidth)}")
    _legend(axes, "upper right" if answer.this else "best")


def _prefix(axes: Any, answer: Estimate) -> None:
    prefix = answer.prefix
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


def _names(axes: Any, answer: Estimate) -> None:
    names = [name for name, _ in columns(answer)]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
