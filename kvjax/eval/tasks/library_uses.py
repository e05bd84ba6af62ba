"""Lines of held-out code that use what another file of their package defines: places where completion needs it."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from kvjax.eval.tasks.library import standard_library

# A line that is too short says little, and one that is too long is mostly text of its own.
_SHORTEST, _LONGEST = 12, 100
# Marks that the metric takes for a comment: such a line would score 0 against itself.
_COMMENTS = ("`", "#", "//")


@dataclass(frozen=True)
class Use:
    """A line that uses a name from another file.

    Attributes:
        path, line: the file and the line's index in it, from 0.
        statement: the import that brings the name, on one line.
        source, first, last: the file that defines the name, and the lines of the definition, `last` exclusive.
    """

    path: str
    line: int
    statement: str
    source: str
    first: int
    last: int


@functools.cache
def held_out_files() -> dict[str, str]:
    """The held-out files by path.

    Raises:
        FileNotFoundError: this interpreter has no source of its standard library.
    """
    return dict(standard_library(held_out=True))


@functools.cache
def held_out_uses() -> tuple[Use, ...]:
    """All uses in the held-out files, by path and line; they depend on nothing but the version of Python.

    Raises:
        FileNotFoundError: this interpreter has no source of its standard library.
    """
    files = held_out_files()
    trees = {path: ast.parse(text) for path, text in files.items()}
    definitions = {path: dict(_definitions(tree)) for path, tree in trees.items()}
    uses = {}
    for path, tree in trees.items():
        lines = files[path].split("\n")
        reads = _reads(tree)
        for name, statement, source, defined in _imports(tree, path, definitions):
            first, last = definitions[source][defined]
            for line in reads.get(name, ()):
                text = lines[line]
                plain = not any(mark in text for mark in _COMMENTS) and text == text.rstrip()
                if plain and len(text.strip()) >= _SHORTEST and len(text) <= _LONGEST and line >= 5:
                    uses.setdefault((path, line), Use(path, line, statement, source, first, last))
    return tuple(use for _, use in sorted(uses.items()))


def _definitions(tree: ast.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Functions and classes at the top of a file, with their lines."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, (node.lineno - 1, node.end_lineno or node.lineno)


def _imports(
    tree: ast.Module, path: str, definitions: dict[str, dict[str, tuple[int, int]]]
) -> Iterator[tuple[str, str, str, str]]:
    """(expression in this file, import statement, defining file, name there) of whatever its package defines."""
    folder = PurePosixPath(path).parent
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = (node.module or "").replace(".", "/")
        base = (folder if node.level else PurePosixPath()) / module
        for alias in node.names:
            here = alias.asname or alias.name
            renamed = f" as {alias.asname}" if alias.asname else ""
            statement = f"from {'.' * node.level}{node.module or ''} import {alias.name}{renamed}"
            if alias.name in definitions.get(f"{base}.py", {}) and f"{base}.py" != path:
                yield here, statement, f"{base}.py", alias.name
            inner = f"{base / alias.name}.py"
            if inner != path:
                for defined in definitions.get(inner, {}):
                    yield f"{here}.{defined}", statement, inner, defined


def _reads(tree: ast.Module) -> dict[str, list[int]]:
    """Lines, from 0, where a name, or a name of a module as in `module.name`, is read."""
    places: dict[str, list[int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            places.setdefault(node.id, []).append(node.lineno - 1)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            places.setdefault(f"{node.value.id}.{node.attr}", []).append(node.lineno - 1)
    return places
