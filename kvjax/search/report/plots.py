"""Plots of a search result, each a Matplotlib Figure that a notebook shows and `savefig` writes.

They are read by luminance, markers and dashes, so that they lose nothing in grayscale.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvjax.search.outcome import FULL
from kvjax.search.report.comparison import pareto, table
from kvjax.search.report.figure import BASE, BODY, INK, MARKERS, Axes, MaxNLocator, ReportFigure, legend_below
from kvjax.search.report.formatting import measured, setting
from kvjax.search.result import SearchResult

__all__ = ["budgets", "convergence", "generations", "pareto", "table"]

DASHES: tuple[Any, ...] = ("--", ":", "-.", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 4)), (0, (1, 4)))
APART = 0.055  # of an axis' height: what two lines of text need


def budgets(result: SearchResult) -> ReportFigure:
    """Tokens that each layer keeps: the chosen candidate as bars, uniform and pyramid as lines.

    The dark foot of a bar is the window and the sinks, which every layer keeps. Layers that slide are absent.
    """
    chosen, floor = np.array(result.tokens), result.config.eviction.floor
    layers = [index for index, window in enumerate(result.windows) if window is None]
    places = np.arange(len(layers))
    figure = ReportFigure(min(max(6.5, 2.5 + 0.28 * len(layers)), 14), 3.8)
    axes = figure.subplots()
    axes.bar(places, chosen, 0.72, color=BODY, label=f"chosen: {result.chosen.name}")
    axes.bar(places, np.minimum(chosen, floor), 0.72, color=BASE, label="window and sinks")
    for name, dashes in (("uniform", "--"), ("pyramid", ":")):
        for outcome in result.outcomes:
            if outcome.name == name and outcome.candidate is not None:
                marker = MARKERS[name]
                retained = result.space.tokens(outcome.candidate)
                axes.plot(places, retained, marker=marker, linestyle=dashes, color=INK, markersize=4, label=name)
    _thin(axes, places, layers)
    axes.set(xlabel="layer", ylabel="tokens kept of a prompt", xlim=(-0.7, len(layers) - 0.3))
    axes.set_ylim(0, None)
    axes.set_title(_exact_mean(chosen), loc="left")
    legend_below(figure)
    return figure


def convergence(result: SearchResult) -> ReportFigure:
    """Every candidate that was evaluated as a dot, the best so far, and the others that cost the same as lines.

    A hollow dot cost more than the budget allows, and is not among the best. All scores are of the search set, which
    flatters what was searched on it.
    """
    figure = ReportFigure(8.5, 4.2)
    axes = figure.subplots()
    scores = np.concatenate([generation.score for generation in result.history] or [np.zeros(0)])
    fair = np.concatenate([result.space.affordable(each.candidates) for each in result.history] or [np.zeros(0, bool)])
    number = 1 + np.arange(len(scores))
    axes.plot(number[fair], 100 * scores[fair], "o", color=BODY, markersize=4, alpha=0.75, label="a candidate")
    if not fair.all():
        axes.plot(
            number[~fair],
            100 * scores[~fair],
            "o",
            markersize=4,
            color=BODY,
            markerfacecolor="none",
            label="costs more",
        )
    best = np.maximum.accumulate(np.where(fair, scores, -np.inf))
    finite = np.isfinite(best)
    last = max(len(scores), 2)
    if finite.any():
        steps, heights = np.append(number[finite], last + 0.5), np.append(best[finite], best[-1])
        axes.step(steps, 100 * heights, where="post", color=INK, linewidth=2, label="best so far")
    axes.set_xlim(0.5 - 0.02 * last, last + 0.5)
    by_score: dict[float, list[str]] = {}
    for outcome in result.outcomes:
        if outcome.name != result.config.allocator:
            by_score.setdefault(100 * outcome.search.mean, []).append(outcome.name)
    for index, score in enumerate(sorted(by_score, reverse=True)):
        line = "-" if FULL in by_score[score] else DASHES[index % len(DASHES)]
        axes.axhline(score, color="grey", linewidth=1.1, linestyle=line, zorder=0)
    _names_at_right(axes, {score: ", ".join(names) for score, names in by_score.items()})
    axes.set(xlabel="candidates evaluated", ylabel=f"{measured(result)},\nsearch set (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{result.config.allocator}: {setting(result)}", loc="left")
    legend_below(figure)
    return figure


def generations(result: SearchResult) -> ReportFigure:
    """The mean candidate of each generation, layer by layer; beneath it the spread, where the allocator has one."""
    layers = [index for index, window in enumerate(result.windows) if window is None]
    spreads = np.array([generation.spread for generation in result.history])
    spreading = bool(np.isfinite(spreads).any())
    figure = ReportFigure(8.5, 2.2 + 0.2 * min(len(layers), 24) + 1.2 * spreading)
    rows = figure.subplots(1 + spreading, 1, squeeze=False, sharex=True, height_ratios=(4, 1)[: 1 + spreading])[:, 0]
    axes, count = rows[0], len(result.history)
    axes.set_title(f"{result.config.allocator}: mean candidate of each generation", loc="left")
    axes.set_ylabel("layer")
    rows[-1].set_xlabel("generation")
    if not count:
        axes.text(0.5, 0.5, "nothing was evaluated", ha="center", va="center", transform=axes.transAxes)
        return figure
    retained = [
        np.array([result.space.tokens(tuple(candidate)) for candidate in each.candidates.tolist()])
        for each in result.history
    ]
    means = np.array([each.mean(axis=0) for each in retained]).T
    # greedy measures layers while all others keep everything: such generations do not set the scale
    fair = means.mean(axis=0) <= 2 * np.mean(result.space.tokens(result.uniform))
    most = float(means[:, fair].max()) if fair.any() else None
    extent = (0.5, count + 0.5, -0.5, len(layers) - 0.5)
    image = axes.imshow(  # light is much: the map's luminance rises all the way
        means, cmap="cividis", vmax=most, aspect="auto", origin="lower", interpolation="nearest", extent=extent
    )
    over = "neither" if fair.all() else "max"
    figure.colorbar(image, ax=axes, label="tokens kept of a prompt", pad=0.01, extend=over)
    _thin(axes, np.arange(len(layers)), layers, vertical=True)
    if spreading:
        rows[1].plot(1 + np.arange(count), spreads, color=INK, marker=".")
        rows[1].set_ylabel("spread (sigma)")
        rows[1].set_ylim(0, 1.15 * float(np.nanmax(spreads)))
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _exact_mean(candidate: np.ndarray) -> str:
    total, layers = int(candidate.sum()), len(candidate)
    mean = f"{total // layers:,}" if total % layers == 0 else f"{total / layers:,.3f}"
    return f"{total:,} tokens in {layers} layers: mean {mean}"


def _names_at_right(axes: Axes, names: dict[float, str]) -> None:
    """Writes each name beside its height, moved up where it would cover the one below."""
    low, high = axes.get_ylim()
    place, gap = -np.inf, APART * (high - low)
    for height in sorted(names):
        place = max(height, place + gap)
        axes.annotate(
            names[height],
            (1.0, height),
            (1.03, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )


def _thin(axes: Axes, places: np.ndarray, layers: Sequence[int], vertical: bool = False) -> None:
    """Ticks at the layers' own numbers, not more than fit."""
    every = 1 + (len(layers) - 1) // 20
    (axes.set_yticks if vertical else axes.set_xticks)(places[::every], [str(index) for index in layers[::every]])
