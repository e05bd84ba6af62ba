"""Plots that compare: a Pareto front over token budgets, and a table of searches by allocators."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvjax.search.outcome import FULL, Outcome
from kvjax.search.report.figure import BODY, INK, MARKERS, PALE, QUIET, Axes, Rectangle, ReportFigure, legend_below
from kvjax.search.report.formatting import cell, label, measured
from kvjax.search.result import SearchResult

KIB = 1024


def pareto(results: Sequence[SearchResult]) -> ReportFigure:
    """Accuracy on the test set against tokens kept, for searches of one model at several token budgets.

    The front joins the candidates that none cheaper equals. Candidates of one cost stand a little apart, so
    that their 95% intervals can be told apart; the full cache is a line with its interval as a band.

    Raises:
        ValueError: no results, or of different models, tasks or samples.
    """
    _check_alike(results)
    first = results[0]
    figure = ReportFigure(8.5, 4.8)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    points: list[tuple[float, float]] = []
    lead, others = statistics.mode(result.chosen.name for result in results), 0
    for name in dict.fromkeys(o.name for r in results for o in r.outcomes if o.candidate is not None):
        rows = [(r, o) for r in results for o in r.outcomes if o.name == name and o.candidate is not None]
        compared = [o for _, o in rows]
        means = np.array([r.space.cost(o.candidate or ()) for r, o in rows])
        points += [(float(mean), 100 * o.test.mean) for mean, o in zip(means, compared, strict=True)]
        leads = name == lead
        others += not leads
        steps = 0 if leads else (others + 1) // 2 * (-1) ** others  # the chosen one in the middle, others around it
        middle = np.array([100 * o.test.mean for o in compared])
        reach = np.abs(np.array([(100 * o.test.low, 100 * o.test.high) for o in compared]).T - middle)
        axes.errorbar(
            means * 2.0 ** (0.04 * steps),
            middle,
            reach,
            fmt="o" if leads else MARKERS.get(name, "*"),
            color=INK if leads else QUIET,
            markerfacecolor=INK if leads else "white",
            markersize=7 if leads else 6,
            elinewidth=1.6 if leads else 0.8,
            label=name,
            zorder=4 if leads else 3,
        )
    front = _front(points)
    front.append((2 * max(mean for mean, _ in points), front[-1][1]))  # more budget is no worse, to the figure's edge
    axes.step(*zip(*front, strict=True), where="post", color=BODY, linewidth=2, label="Pareto front", zorder=2)
    for outcome in [o for o in first.outcomes if o.candidate is None][:1]:
        test = outcome.test
        axes.axhline(100 * test.mean, color=INK, linestyle="--", linewidth=1.2, label=FULL)
        axes.axhspan(100 * test.low, 100 * test.high, color=PALE, alpha=0.6, zorder=0, linewidth=0)
    ticks = sorted({result.config.token_budget for result in results})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    token = _bytes_of_token(first) / KIB
    top = axes.secondary_xaxis("top", functions=(lambda x: np.multiply(x, token), lambda x: np.divide(x, token)))
    top.set_xticks([tick * token for tick in ticks], [f"{tick * token:,.0f}" for tick in ticks])
    top.minorticks_off()
    top.set_xlabel("KV kept of a prompt (KiB in bfloat16)")
    axes.set(xlabel="tokens kept of a prompt, mean of the layers", ylabel=f"{measured(first)},\ntest set (%)")
    axes.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)
    legend_below(figure)
    return figure


def table(results: Sequence[SearchResult]) -> ReportFigure:
    """Tasks by allocators: the test score x100 over its 95% interval; a darker cell is a better one in its row.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("no results: give those of one search at least")
    names = list(dict.fromkeys(outcome.name for result in results for outcome in result.outcomes))
    figure = ReportFigure(2.6 + 1.15 * len(names), 0.9 + 0.52 * len(results))
    axes = figure.subplots()
    for row, result in enumerate(results):
        cells = {outcome.name: outcome for outcome in result.outcomes}
        means = [outcome.test.mean for outcome in result.outcomes if outcome.candidate is not None]
        low, high = min(means, default=0.0), max(means, default=1.0)
        for column, name in enumerate(names):
            if (outcome := cells.get(name)) is not None:
                _draw_cell(axes, column, row, outcome, (outcome.test.mean - low) / max(high - low, 1e-9))
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(results) - 0.5, -0.5))
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(names)), [name.replace("-", "-\n").replace(" ", "\n") for name in names])
    axes.set_yticks(range(len(results)), [label(result) for result in results])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    kinds = " / ".join(dict.fromkeys(measured(result) for result in results))
    axes.set_xlabel(
        f"{kinds}, test set (%), with the 95% interval; darker is better in its row, bold the best at this budget"
    )
    return figure


def _draw_cell(axes: Axes, column: int, row: int, outcome: Outcome, share: float) -> None:
    compared = outcome.candidate is not None
    grey = 1 - 0.3 * share if compared else 1.0
    axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=(grey,) * 3, linewidth=0))
    mean, interval = cell(outcome.test)
    weight = "bold" if compared and share > 1 - 1e-9 else "normal"
    axes.text(column, row - 0.12, mean, ha="center", va="center", fontweight=weight, color="black")
    axes.text(column, row + 0.24, interval, ha="center", va="center", fontsize=7, color=INK)


def _bytes_of_token(result: SearchResult) -> int:
    """Bytes that one more token in every layer takes, K and V of all kv heads, two bytes a number."""
    return 2 * 2 * len(result.tokens) * result.model.kv_heads * result.model.head_dim


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, cheapest first, that are better than all others of no higher cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _check_alike(results: Sequence[SearchResult]) -> None:
    if not results:
        raise ValueError("no results: give those of one search at least")
    kinds: dict[str, Callable[[SearchResult], Any]] = {
        "weights": lambda r: r.model.weights,
        "tasks": lambda r: r.config.tasks,
        "length": lambda r: r.config.length,
        "query_aware": lambda r: r.config.query_aware,
        "measure": lambda r: r.config.measure,
        "test": lambda r: r.config.test,
    }
    for name, read in kinds.items():
        values = list(dict.fromkeys(str(read(result)) for result in results))
        if len(values) > 1:
            raise ValueError(f"results of different {name}, {values}, have no front in common: draw each by itself")
