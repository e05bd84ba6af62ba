"""What all pictures of a search are drawn on and with."""

import io

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('the pictures need matplotlib: pip install "kvjax[search]"') from error

__all__ = [
    "BASE",
    "BODY",
    "INK",
    "MARKERS",
    "PALE",
    "QUIET",
    "Axes",
    "MaxNLocator",
    "Picture",
    "Rectangle",
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


class Picture(Figure):
    """A figure that needs no pyplot: nothing is global, and a notebook shows it all the same."""

    def __init__(self, width: float, height: float) -> None:
        """In inches."""
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png", dpi=90)
        return written.getvalue()


def legend_below(picture: Figure) -> None:
    """One legend for all of a picture, out of the way of what it explains."""
    picture.legend(loc="outside lower center", ncols=5, frameon=False, fontsize="small")
