"""`--show-kept`: the first sample of each task, drawn in the terminal or in a file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from kvjax.eval.arguments import TERMINAL, Arguments
from kvjax.eval.kept import Kept, held
from kvjax.eval.plan import Plan
from kvjax.eval.target import RequestFailedError, Target
from kvjax.eval.target_engine import EngineTarget

BLOCKS = " ░▒▓█"  # nothing, a little, half, most, all of the tokens that a character stands for
LOST = "x"
WIDEST = 120  # characters of a row


def show_kept(target: Target, start: Callable[[], None], plan: Plan, given: Arguments, out: Console) -> None:
    """Asks for the first sample of each task at its greatest length, and draws what was kept of it.

    Args:
        start: starts the engine, which may have had nothing to do until now.
    """
    assert isinstance(target, EngineTarget)
    assert given.show_kept is not None
    if target.engine.phase == "loading":
        start()
    observed = []
    firsts = {case.task.name: case for case in sorted(plan.cases, key=lambda case: case.length) if case.index == 0}
    for name in dict.fromkeys(cell.task.name for cell in plan.cells):
        try:
            observed.append(Kept.observe(target, firsts[name], given.conduct))
        except RequestFailedError as error:
            out.print(f"nothing to show of {name}: {error}", markup=False)
    if not observed:
        return
    hidden = ", the question hidden" if given.conduct.agnostic else ""
    if given.show_kept == TERMINAL:
        for kept in observed:
            out.print(*drawing(kept, min(out.width, WIDEST)), "", sep="\n")
        return
    from kvjax.eval.kept_plot import plot

    plot(observed, f"What each layer keeps: {target.name}{hidden}", Path(given.show_kept))
    out.print(f"What was kept is drawn in {given.show_kept}", markup=False)


def drawing(kept: Kept, width: int) -> list[Text]:
    """A row a layer, in `width` characters: how much its heads keep, and where the answer stands."""
    head = len(f"layer {len(kept.layers) - 1} ")
    cells = Kept(kept.name, kept.layers, kept.question).binned(max(width - head - len(" 100%"), 8))
    columns = cells.shape[1]

    def column(token: int) -> int:
        return token * columns // kept.length

    marks = {column(span.start): "▼" for span in kept.answers}
    question = column(kept.question)
    places = "".join(marks.get(i, "?" if i == question else " ") for i in range(columns))
    lines = [
        Text(f"{kept.name}: {kept.length:,} tokens, {kept.share:.0%} kept", style="bold"),
        Text(f"{'':{head}}{places} kept" if kept.answers else f"{'':{head}}{places}", style="dim"),
    ]
    borders = np.cumsum([0, *(layer.shape[0] for layer in kept.layers)])
    for index, layer in enumerate(kept.layers):
        shares = cells[borders[index] : borders[index + 1]].mean(axis=0)
        line = Text(f"{f'layer {index}':{head}}", no_wrap=True)
        answers: dict[int, float] = {}
        for span in kept.answers:
            place = column(span.start)
            answers[place] = min(answers.get(place, 1.0), float(held(layer, span).mean()))
        for place, share in enumerate(shares):
            if place in answers:
                found = answers[place]
                line.append(
                    BLOCKS[-1] if found else LOST, style="green" if found == 1 else "yellow" if found else "red"
                )
            else:
                line.append(BLOCKS[int(np.ceil(share * (len(BLOCKS) - 1)))], style="blue")
        survival = kept.survival(index)
        lines.append(line if survival is None else line.append(f" {survival:4.0%}"))
    return lines
