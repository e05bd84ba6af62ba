"""Record of `benchmarks.device`: every row in the order of the points, written whenever one changes."""

import datetime
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common.report import former_rows, write_rows
from benchmarks.device.point import Point

MODULE = "benchmarks.device"
TRIES = 2  # a point that has ended the process so often is not measured again
OUTCOMES = ("measured", "skipped", "failed")

Row = dict[str, Any]


class Record:
    """Rows by the names of their points.

    A row has "predicted" before "measured", and "tries" while it is being measured: whatever ends the process leaves
    them behind. "skipped" and "failed" are reasons.

    Args:
        path: None keeps nothing.

    Raises:
        ValueError: the file is something else, or of another device or size.
    """

    def __init__(self, path: pathlib.Path | None, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, settings
        rows = former_rows(path, settings) if path else []
        self._rows: dict[str, Row] = {row["name"]: row for row in rows}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def expect(self, points: Iterable[Point]) -> None:
        """Writes the prediction of each point. Earlier predictions stay as they are."""
        today = datetime.date.today().isoformat()
        for point in points:
            known = self._rows.get(point.name, {})
            if "measured" in known or "failed" in known:
                continue
            earlier = {key: known[key] for key in ("predicted", "predicted_on", "tries") if key in known}
            # a prediction may come from another machine, but a skip is decided on this one
            self._rows[point.name] = point.row() | {"predicted_on": today} | earlier
        self._write()

    def open(self, point: Point) -> bool:
        """Whether a point is still to be measured."""
        row = self._rows[point.name]
        if row.get("tries", 0) >= TRIES and not self._known(row):
            self._close(point.name, {"failed": f"the process ended while it was measured, {row['tries']} times"})
        return not self._known(row)

    def begin(self, point: Point) -> None:
        row = self._rows[point.name]
        row["tries"] = row.get("tries", 0) + 1
        self._write()

    def finish(self, point: Point, outcome: Mapping[str, Any], device: str, took: float) -> Row:
        """Writes {"measured": ...} or {"failed": ...}."""
        on = {"device": device, "date": datetime.date.today().isoformat(), "took": round(took, 1)}
        return self._close(point.name, {**outcome, "on": on})

    def again(self) -> None:
        """Opens failed points again."""
        for row in self._rows.values():
            if "failed" in row:
                for key in ("failed", "on"):
                    row.pop(key, None)

    def longest(self) -> dict[str, float]:
        """Seconds of the slowest point of each part, compiling included."""
        slowest: dict[str, float] = {}
        for row in self._rows.values():
            if "on" in row:
                slowest[row["part"]] = max(slowest.get(row["part"], 0.0), row["on"]["took"])
        return slowest

    def devices(self) -> set[str]:
        """The devices that rows were measured on."""
        return {row["on"]["device"] for row in self._rows.values() if "measured" in row}

    def _known(self, row: Row) -> bool:
        return any(outcome in row for outcome in OUTCOMES)

    def _close(self, name: str, outcome: Mapping[str, Any]) -> Row:
        row = self._rows[name]
        row.pop("tries", None)
        row.update(outcome)
        self._write()
        return row

    def _write(self) -> None:
        mark(self.rows)
        if self._path:
            write_rows(self._path, MODULE, self.rows, self._settings)


def mark(rows: Iterable[Row]) -> None:
    """Times of kernels that are wrong are marked as such, in place."""
    rows = list(rows)
    compared = [row for row in rows if row["part"] == "correctness"]
    wrong = {(row["operation"], row["implementation"]) for row in compared if is_wrong(row)}
    for row in rows:
        row.pop("marked", None)
        if row["part"] == "kernels" and (row["operation"], row["implementation"]) in wrong:
            row["marked"] = "the kernel's results are not those of the reference"
        elif row["part"] == "kernels" and is_wrong(row):
            row["marked"] = "its result at this size is not that of the reference"


def is_wrong(row: Row) -> bool:
    """A kernel that fails where it is compared is as wrong as one whose numbers are."""
    failed = row["part"] == "correctness" and "failed" in row
    return failed or row.get("measured", {}).get("wrong", False)
