"""`--show-retained`: the retained tokens of each task's first sample, drawn in the terminal or in a file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from kvjax.eval.arguments import TERMINAL, Arguments
from kvjax.eval.plan import Plan
from kvjax.eval.retained.retained import Retained, retained_share
from kvjax.eval.targets import Target, TargetFailedError
from kvjax.eval.targets.engine import EngineTarget

BLOCKS = " ░▒▓█"  # nothing, a little, half, most, all of the tokens that a character stands for
LOST = "x"
WIDEST = 120  # characters of a row


def show_retained(target: Target, start: Callable[[], None], plan: Plan, given: Arguments, out: Console) -> None:
    """Draws the retained tokens of the first sample of each task at its greatest length.

    Args:
        start: starts the engine if it has not run yet.
    """
    assert isinstance(target, EngineTarget)
    assert given.show_retained is not None
    if target.engine.phase == "loading":
        start()
    observed = []
    firsts = {case.task.name: case for case in sorted(plan.cases, key=lambda case: case.length) if case.index == 0}
    for name in dict.fromkeys(cell.task.name for cell in plan.cells):
        try:
            observed.append(Retained.observe(target, firsts[name], given.conduct))
        except TargetFailedError as error:
            out.print(f"nothing to draw of {name}: {error}", markup=False)
    if not observed:
        return
    hidden = ", the question hidden" if given.conduct.query_agnostic else ""
    if given.show_retained == TERMINAL:
        for retained in observed:
            out.print(*drawing(retained, min(out.width, WIDEST)), "", sep="\n")
        return
    from kvjax.eval.retained.plot import plot

    plot(observed, f"Tokens that each layer retains: {target.name}{hidden}", Path(given.show_retained))
    out.print(f"The retained tokens are drawn in {given.show_retained}", markup=False)


def drawing(retained: Retained, width: int) -> list[Text]:
    """A row a layer, in `width` characters: the share that its heads retain, and the place of the answer."""
    head = len(f"layer {len(retained.layers) - 1} ")
    cells = Retained(retained.name, retained.layers, retained.question).binned(max(width - head - len(" 100%"), 8))
    columns = cells.shape[1]

    def column(token: int) -> int:
        return token * columns // retained.length

    marks = {column(span.start): "▼" for span in retained.answers}
    question = column(retained.question)
    places = "".join(marks.get(i, "?" if i == question else " ") for i in range(columns))
    lines = [
        Text(f"{retained.name}: {retained.length:,} tokens, {retained.share:.0%} kept", style="bold"),
        Text(f"{'':{head}}{places} kept" if retained.answers else f"{'':{head}}{places}", style="dim"),
    ]
    borders = np.cumsum([0, *(layer.shape[0] for layer in retained.layers)])
    for index, layer in enumerate(retained.layers):
        shares = cells[borders[index] : borders[index + 1]].mean(axis=0)
        line = Text(f"{f'layer {index}':{head}}", no_wrap=True)
        answers: dict[int, float] = {}
        for span in retained.answers:
            place = column(span.start)
            answers[place] = min(answers.get(place, 1.0), float(retained_share(layer, span).mean()))
        for place, share in enumerate(shares):
            if place in answers:
                survived = answers[place]
                style = "green" if survived == 1 else "yellow" if survived else "red"
                line.append(BLOCKS[-1] if survived else LOST, style=style)
            else:
                line.append(BLOCKS[int(np.ceil(share * (len(BLOCKS) - 1)))], style="blue")
        survival = retained.survival(index)
        lines.append(line if survival is None else line.append(f" {survival:4.0%}"))
    return lines
