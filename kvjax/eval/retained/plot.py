"""Figures of retained tokens: layers and their heads from top to bottom, the prompt from left to right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from kvjax.eval.retained.retained import Retained, retained_share

DROPPED, RETAINED = "#eceff1", "#5b8db8"
LOST, FOUND = "#d7301f", "#16833b"  # an answer's tokens
INK = "#263238"
COLUMNS = 1600  # cells that a row is drawn with at most
NARROWEST = 0.006  # of the width: an answer is a few of many thousand tokens, and has to be seen
WIDTH, ROW, FRAME = 13.0, 0.11, 1.05  # inches: of the figure, of a head, around a prompt


def shades(share: Float[np.ndarray, "..."], none: str, every: str) -> Float[np.ndarray, "... 3"]:
    """A colour for each share: `none` where it is 0, `every` where it is 1, and between."""
    low, high = (np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for text in (none, every))
    return low + (high - low) * share[..., None]


def plot(observed: Sequence[Retained], title: str, path: Path) -> None:
    """Writes a PNG, one panel a prompt.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--show-retained with a file needs matplotlib: pip install "kvjax[train]"') from error
    heights = [FRAME + ROW * max(sum(layer.shape[0] for layer in retained.layers), 12) for retained in observed]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=INK, fontweight="bold")
    panels = figure.subplots(len(observed), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, retained in zip(panels, observed, strict=True):
        _panel(axes, retained)
    _legend(figure)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, retained: Retained) -> None:
    heads = [layer.shape[0] for layer in retained.layers]
    borders, rows, length = np.cumsum([0, *heads]), sum(heads), retained.length
    cells = shades(retained.binned(COLUMNS), DROPPED, RETAINED)
    axes.imshow(cells, extent=(0, length, rows, 0), aspect="auto", interpolation="nearest")
    every = np.concatenate(retained.layers)
    least = length * NARROWEST
    for span, marker in [(s, "v") for s in retained.answers] + [(s, "1") for s in retained.later]:
        middle, half = (span.start + span.stop) / 2, max(len(span), least) / 2
        strip = shades(retained_share(every, span)[:, None], LOST, FOUND)
        axes.imshow(strip, extent=(middle - half, middle + half, rows, 0), aspect="auto", interpolation="nearest")
        axes.plot(middle, -0.02 * rows, marker=marker, color=INK, markersize=7, clip_on=False, linestyle="none")
    axes.axvline(retained.question, color=INK, linewidth=1, linestyle="--")
    axes.hlines(borders[1:-1], 0, length, color="white", linewidth=1.6)
    axes.set(xlim=(0, length), ylim=(rows, 0), xlabel="position in the prompt (tokens)")
    axes.set_yticks((borders[:-1] + borders[1:]) / 2, [f"layer {index}" for index in range(len(heads))])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{retained.name}: {length:,} tokens, {retained.share:.0%} kept", loc="left", pad=14, color=INK)
    for index in range(len(heads)):
        if (survival := retained.survival(index)) is not None:
            [colour] = shades(np.array([survival]), LOST, FOUND)
            middle = (borders[index] + borders[index + 1]) / 2
            axes.text(1.006 * length, middle, f"{survival:.0%}", va="center", color=colour, fontweight="bold")
    survival_label = "answer\nkept" if retained.answers else "no answer\nin the context"
    axes.text(1.006 * length, -0.04 * rows, survival_label, va="bottom", fontsize="small", color=INK)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color=RETAINED, label="retained"),
            Patch(color=DROPPED, label="dropped"),
            Patch(color=FOUND, label="answer, retained"),
            Patch(color=LOST, label="answer, dropped"),
            Line2D([], [], color=INK, marker="v", linestyle="none", label="answer of this turn"),
            Line2D([], [], color=INK, marker="1", linestyle="none", label="answer of a later turn"),
            Line2D([], [], color=INK, linestyle="--", label="the question begins"),
        ],
        loc="outside lower center",
        ncols=7,
        frameon=False,
        fontsize="small",
    )
