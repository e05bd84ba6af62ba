"""Tables of `benchmarks.methods`: one for each length and mode, and one of their means."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvjax.eval.report import binary

MODES = {
    "aware": "question in sight",
    "agnostic": "question hidden",
    "anew": "turns, each selects anew",
    "evicted": "turns, evicted for good",
}
NOTHING = "-"
RESAMPLES = 10_000

Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> Iterator[RenderableType]:
    """For each length a table a mode and then that of the means, and at the end why budgets were refused."""
    for length in dict.fromkeys(row["length"] for row in rows):
        own = [row for row in rows if row["length"] == length]
        for mode in MODES:
            if any(tasks_of(row, mode) for row in own):
                yield mode_table(own, mode, f"{length:,} tokens, {MODES[mode]}")
        yield mean_table(own, f"{length:,} tokens, means over tasks")
    yield from refusals(rows)


def mode_table(rows: Sequence[Row], mode: str, title: str) -> Table:
    """Every task of a mode with its interval."""
    names = list(dict.fromkeys(name for row in rows for name in tasks_of(row, mode)))
    table = _table(title)
    for name in (*names, "mean"):
        table.add_column(name, justify="right")
        table.add_column("", style="dim")
    for row in rows:
        scores = [tasks_of(row, mode).get(name) for name in names] + [row.get("modes", {}).get(mode)]
        table.add_row(*_head(row), *(text for score in scores for text in _score(score)))
    return table


def mean_table(rows: Sequence[Row], title: str) -> Table:
    """The mean over tasks of every mode, and how many answers are word for word those of the full cache."""
    full = next((row for row in rows if row["budget"] is None), None)
    modes = [mode for mode in MODES if any(tasks_of(row, mode) for row in rows)]
    table = _table(title)
    for mode in modes:
        table.add_column(MODES[mode], justify="right")
        table.add_column("", style="dim")
    table.add_column("as full says", justify="right")
    for row in rows:
        scores = [text for mode in modes for text in _score(row.get("modes", {}).get(mode))]
        same = agreement(row, full, "aware") if full is not None else None
        table.add_row(*_head(row), *scores, NOTHING if same is None else f"{same:.0%}")
    return table


def agreement(row: Row, full: Row, mode: str) -> float | None:
    """The share of samples in which a row answers exactly as the full cache; None if nothing can be compared."""
    own_tasks, other_tasks = tasks_of(row, mode), tasks_of(full, mode)
    pairs = [
        (digest, other_tasks[task]["said"][index])
        for task in own_tasks
        if task in other_tasks
        for index, digest in own_tasks[task]["said"].items()
        if index in other_tasks[task]["said"]
    ]
    return sum(digest == other for digest, other in pairs) / len(pairs) if pairs else None


def equal_tables(rows: Sequence[Row]) -> Iterator[RenderableType]:
    """RocketKV of whole pages less the published one, where it reads the most that is no more bytes a step."""
    pairs = list(equal_pairs(rows))
    if not pairs:
        return
    table = Table(box=box.SIMPLE_HEAD, title="rocketkv less rocketkv-faithful at equal bytes read, in points")
    table.title_justify, table.title_style = "left", "bold"
    for name in ("tokens", "budget", "reads", "of rocketkv", "reads"):
        table.add_column(name, justify="right", no_wrap=True)
    modes = [mode for mode in MODES if any(tasks_of(row, mode) for pair in pairs for row in pair)]
    for mode in modes:
        table.add_column(MODES[mode], justify="right")
        table.add_column("", style="dim")
    for faithful, paged in pairs:
        table.add_row(
            f"{faithful['length']:,}",
            *(text for row in (faithful, paged) for text in (f"{row['budget']:,}", binary(row["read"]))),
            *(text for mode in modes for text in _points(difference(paged, faithful, mode))),
        )
    yield table


def equal_pairs(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Each row of the published RocketKV with the one of whole pages that reads nearly as much, and no more."""
    for faithful in rows:
        if faithful["arm"] != "rocketkv-faithful" or faithful["refused"]:
            continue
        others = [
            row
            for row in rows
            if row["arm"] == "rocketkv" and row["length"] == faithful["length"] and not row["refused"]
            if row["read"] <= faithful["read"]
        ]
        if others:
            yield faithful, max(others, key=lambda row: (row["read"], row["budget"]))


def difference(row: Row, other: Row, mode: str) -> tuple[float, float, float] | None:
    """The score of a row less that of another on the same samples, in [-1, 1], with its 95% interval.

    The mean over tasks of the means of differences, and the percentile bootstrap over the samples of each task, with a
    fixed seed. None if no sample was scored by both.
    """
    own_tasks, other_tasks = tasks_of(row, mode), tasks_of(other, mode)
    pairs = [
        np.array(
            [score - other_tasks[task]["scores"][index] for index, score in entry["scores"].items() if index in there]
        )
        for task, entry in own_tasks.items()
        if task in other_tasks and (there := other_tasks[task]["scores"].keys() & entry["scores"].keys())
    ]
    if not pairs:
        return None
    rng = np.random.default_rng(0)
    means = [each[rng.integers(each.size, size=(RESAMPLES, each.size))].mean(axis=1) for each in pairs]
    low, high = np.quantile(np.mean(means, axis=0), (0.025, 0.975))
    return float(np.mean([each.mean() for each in pairs])), float(low), float(high)


def _points(interval: tuple[float, float, float] | None) -> tuple[str, str]:
    if interval is None:
        return NOTHING, ""
    mean, low, high = (100 * value for value in interval)
    return f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}"


def refusals(rows: Sequence[Row]) -> Iterator[Text]:
    """The reasons for dashes: a line for each reason of a method or a sample."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        name = f"{row['arm']} {row['budget']} at {row['length']:,}"
        if row["refused"]:
            reasons.setdefault(row["refused"], []).append(name)
        for mode in row.get("modes", {}).values():
            for entry in mode["tasks"].values():
                for error in entry["errors"]:
                    names = reasons.setdefault(error, [])
                    names += [] if name in names else [name]
    for reason, names in reasons.items():
        yield Text(f"{NOTHING} {', '.join(names)}: {reason}", style="dim")


def tasks_of(row: Row, mode: str) -> Mapping[str, Any]:
    """The scores of a row in a mode, by task; empty where its method refused."""
    return row.get("modes", {}).get(mode, {}).get("tasks", {})


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("arm", no_wrap=True)
    for name in ("budget", "kept", "", "read a step", ""):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _head(row: Row) -> list[str]:
    budget = "" if row["budget"] is None else f"{row['budget']:,}"
    if row["refused"]:
        return [row["arm"], budget, NOTHING, "", NOTHING, ""]
    return [
        row["arm"],
        budget,
        *(text for name in ("kept", "read") for text in (binary(row[name]), f"{row[name] / row['full']:.0%}")),
    ]


def _score(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    """A mean x100 and its 95% interval."""
    if not entry or entry["mean"] is None:
        return NOTHING, ""
    failed = f" {entry['failed']} failed" if entry.get("failed") else ""
    return f"{100 * entry['mean']:.1f}", f"{100 * entry['low']:.0f}-{100 * entry['high']:.0f}{failed}"
