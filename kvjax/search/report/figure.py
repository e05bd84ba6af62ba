"""Canvas, colours and markers that all plots of a search share."""

import io

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('plots need matplotlib: pip install "kvjax[search]"') from error

__all__ = [
    "BASE",
    "BODY",
    "INK",
    "MARKERS",
    "PALE",
    "QUIET",
    "Axes",
    "MaxNLocator",
    "Rectangle",
    "ReportFigure",
    "legend_below",
]

INK, BODY, BASE, QUIET, PALE = "#263238", "#5b8db8", "#1f3a57", "#78909c", "#cfd8dc"
MARKERS = {
    "uniform": "s",
    "pyramid": "v",
    "inverse-pyramid": "^",
    "entropy": "D",
    "greedy": "P",
    "fine-greedy": "p",
    "random": "X",
    "streaming": "<",
}


class ReportFigure(Figure):
    """A figure that needs no pyplot: nothing is global, and a notebook shows it all the same."""

    def __init__(self, width: float, height: float) -> None:
        """In inches."""
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=90)
        return written.getvalue()


def legend_below(figure: Figure) -> None:
    """One legend for a whole figure, below its axes."""
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
