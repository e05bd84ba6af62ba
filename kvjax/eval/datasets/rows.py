"""Rows: the records of a benchmark's file (JSON, JSON Lines or Parquet), checked field by field.

Errors name the file, the line and the field.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class LoadError(ValueError):
    """A file of a benchmark is not what its loader expects; the message names the file, the line and the field."""


@dataclass(frozen=True)
class Row:
    """One record of a file and where it stands."""

    path: Path
    line: int
    fields: dict[str, Any]

    def error(self, what: str) -> LoadError:
        """An error that says where it is."""
        return LoadError(f"{self.path}:{self.line}: {what}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def value(self, *names: str) -> Any:
        """The field of the first of these names that is there.

        Raises:
            LoadError: none is.
        """
        for name in names:
            if self.has(name):
                return self.fields[name]
        fields = " or ".join(f"field {name!r}" for name in names)
        raise self.error(f"{fields} is missing; there are {', '.join(map(repr, self.fields)) or 'none'}")

    def text(self, *names: str) -> str:
        """A field that is a string, or a number written as one.

        Raises:
            LoadError: it is missing or something else.
        """
        value = self.value(*names)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(f"field {names[0]!r} must be a string, it is {_kind(value)}")
        return str(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """A field that is a list of strings or numbers, or one of them alone; never empty.

        Raises:
            LoadError: it is missing, empty or something else.
        """
        value = self.value(*names)
        items = value if isinstance(value, list) else [value]
        if not items or any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
            raise self.error(f"field {names[0]!r} must be a string or a list of some, it is {_kind(value)}")
        return tuple(map(str, items))

    def rows(self, name: str) -> list["Row"]:
        """A field that is a list of records; never empty.

        Raises:
            LoadError: it is missing, empty or something else.
        """
        value = self.value(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            raise self.error(f"field {name!r} must be a list of objects, it is {_kind(value)}")
        return [Row(self.path, self.line, item) for item in value]


def _kind(value: object) -> str:
    return "an empty list" if value == [] else f"{type(value).__name__} {str(value)[:40]!r}"


def read_rows(path: Path) -> list[Row]:
    """All records of a `.jsonl` file (one a line), a `.json` file (a list) or a `.parquet` file.

    The line of a record is its line in a `.jsonl` file and its number from 1 in others.

    Raises:
        FileNotFoundError: there is no such file.
        LoadError: it is of another kind, is broken, or holds no record.
        ImportError: pyarrow is missing and the file is a `.parquet` file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the path of a file of the benchmark on this machine")
    kinds = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise LoadError(f"{path}: files of kind {path.suffix!r} are not read, only {', '.join(kinds)}: convert it")
    rows = []
    for line, fields in kinds[path.suffix](path):
        if not isinstance(fields, dict):
            raise LoadError(f"{path}:{line}: a record must be an object, it is {_kind(fields)}")
        rows.append(Row(path, line, fields))
    if not rows:
        raise LoadError(f"{path}: the file holds no record")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    raise LoadError(f"{path}:{number}: not JSON: {error}") from error


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, list):
        raise LoadError(f"{path}: must be a list of records, it is {_kind(content)}")
    yield from enumerate(content, 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError(f'{path}: .parquet files need pyarrow: pip install "kvjax[eval]"') from error
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
    except ArrowInvalid as error:
        raise LoadError(f"{path}: not a .parquet file: {error}") from error
