"""The plot of the gate's figures: accuracy by length and depth, and by length for each task."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from benchmarks.model_card.figure import Figure


def grid(figures: Iterable[Figure], family: str) -> tuple[list[int], list[float], Float[np.ndarray, "depths lengths"]]:
    """Lengths, depths and mean accuracy of the tasks whose names hold `family`; a cell without figures is NaN."""
    cells: dict[tuple[float, int], list[float]] = {}
    for figure in figures:
        for depth, accuracy in figure.depths.items():
            if family in figure.task:
                cells.setdefault((depth, figure.length), []).append(accuracy)
    lengths, depths = sorted({length for _, length in cells}), sorted({depth for depth, _ in cells})
    mean = [[float(np.mean(cells.get((depth, length), [np.nan]))) for length in lengths] for depth in depths]
    return lengths, depths, np.array(mean, np.float64).reshape(len(depths), len(lengths))


def plot(figures: Sequence[Figure], bars: Mapping[str, float], path: Path) -> None:
    """Writes a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Picture
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "kvjax[train]"') from error
    picture = Picture(figsize=(16, 4.5), layout="constrained")
    FigureCanvasAgg(picture)
    left, middle, right = picture.subplots(1, 3, width_ratios=(1, 1, 1.3))
    for axes, family in ((left, "single"), (middle, "multikey")):
        lengths, depths, mean = grid(figures, family)
        axes.set_title(f"needle tasks, {family}: accuracy (%)")
        axes.set_xlabel("tokens of prompt and answer")
        axes.set_ylabel("depth of the needle in the context")
        if not mean.size:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
            continue
        axes.imshow(mean, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for (row, column), value in np.ndenumerate(mean):
            axes.text(column, row, "" if np.isnan(value) else f"{100 * value:.0f}", ha="center", va="center")
    names = dict.fromkeys(figure.task for figure in figures)
    for index, task in enumerate(names):
        own = [figure for figure in figures if figure.task == task]
        lengths = sorted({figure.length for figure in own})
        means = [float(np.mean([f.accuracy for f in own if f.length == length])) for length in lengths]
        right.plot(lengths, means, marker="os^Dv<>pPX*"[index % 11], label=task)
    for bar in sorted(set(bars.values())):
        right.axhline(bar, color="grey", linewidth=0.8, linestyle=":")
    right.set_xscale("log", base=2)
    ticks = sorted({figure.length for figure in figures})
    right.set_xticks(ticks, [str(length) for length in ticks])
    right.minorticks_off()
    right.set_ylim(-0.02, 1.04)
    right.set_title("accuracy, all depths and forms of prompt; dotted: the bars")
    right.set_xlabel("tokens of prompt and answer")
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    picture.savefig(path, dpi=110)
