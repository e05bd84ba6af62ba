"""Arrows point one way: which part of the library may import which, read from the source of every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from kvjax.models.rope import rotate

ROOT = Path(__file__).parents[1]

CORE = {"budget", "cache"}
MATH = CORE | {"attention"}
KERNELS = MATH | {"pallas"}
MODELS = KERNELS | {"models"}
ENGINE = MODELS | {"store", "engine", "identity"}
# A part is a module or a folder of kvjax; it may import itself, what is listed here, and `configs` (data).
ALLOWED = {
    "__main__": set(),  # the command `kvjax` imports the command given by name, and nothing before
    "budget": set(),
    "cache": CORE,
    "identity": set(),
    "attention": MATH,
    "pallas": KERNELS,
    "models": MODELS,
    "store": set(),
    "engine": ENGINE,
    "eval": ENGINE | {"eval"},
    "plan": ENGINE | {"plan"},
    "search": ENGINE | {"eval", "search"},
    "train": ENGINE | {"eval", "train"},
    "serve": ENGINE | {"serve"},
    "configs": set(),
}


def imported_parts(source: str, package: str = "kvjax") -> Iterator[tuple[int, str]]:
    """Line and part for each import of kvjax in `source`, lazy ones and those named in a string too."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
        for name in names:
            path = name.split(".")
            if path[0] == "kvjax" and len(path) > 1 and not path[1].startswith("__"):
                yield node.lineno, path[1]


def sources() -> list[tuple[str, str, Path]]:
    """(part, package, file) for every Python file of the library; models/ and configs/ lie beside kvjax/."""
    found = []
    for folder in ("kvjax", "models", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if folder != "kvjax":
                inside = Path("kvjax") / inside
            elif inside.parts[1] in ("models", "configs"):
                continue  # the links to those two folders
            found.append((Path(inside.parts[1]).stem, ".".join(inside.parts[:-1]), path))
    return found


def test_every_part_imports_only_what_lies_below_it():
    wrong = []
    for part, package, path in sources():
        if part == "__init__":
            allowed = set()  # `import kvjax` stays cheap and pulls nothing in
        else:
            assert part in ALLOWED, f"kvjax.{part} has no place in ALLOWED: say what it may import"
            allowed = ALLOWED[part] | {part, "configs"}
        for line, name in imported_parts(path.read_text(), package):
            if name not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports {name}")
    assert not wrong, "arrows that point the wrong way:\n" + "\n".join(wrong)


def test_every_part_is_found():
    assert {part for part, _, _ in sources()} >= {"budget", "cache", "attention", "pallas", "models", "serve"}


def test_the_table_has_no_cycle():
    def below(part: str, seen: tuple[str, ...] = ()) -> None:
        assert part not in seen, f"cycle: {' -> '.join((*seen, part))}"
        for name in ALLOWED[part] - {part}:
            below(name, (*seen, part))

    for part in ALLOWED.keys() - CORE:
        below(part)


def test_nothing_imports_serve_and_store_knows_bytes_only():
    assert not [part for part, allowed in ALLOWED.items() if "serve" in allowed and part != "serve"]
    assert not ALLOWED["store"] & {"models", "engine", "attention"}


@pytest.mark.parametrize(
    ("source", "package", "parts"),
    [
        ("import kvjax.serve.app", "kvjax", ["serve"]),
        ("import kvjax.serve as s", "kvjax", ["serve"]),
        ("from kvjax import engine, store", "kvjax", ["engine", "store"]),
        ("from kvjax.models.rope import apply", "kvjax", ["models"]),
        ("def f():\n    from kvjax.engine.engine import Engine", "kvjax", ["engine"]),
        ("if TYPE_CHECKING:\n    from kvjax.serve import app", "kvjax", ["serve"]),
        ("importlib.import_module('kvjax.search.space')", "kvjax", ["search"]),
        ("from . import keys", "kvjax.store", ["store"]),
        ("from ..engine import runner", "kvjax.store", ["engine"]),
        ("from .. import engine", "kvjax.store", ["engine"]),
        ("from kvjax import __version__", "kvjax", []),
        ("import jax, kvjaxtra.serve", "kvjax", []),
    ],
)
def test_imports_are_seen(source, package, parts):
    assert [part for _, part in imported_parts(source, package)] == parts


def test_shapes_are_checked_while_tests_run():
    """Without the import hook of conftest.py every shape in a signature would be a comment."""
    turned, narrow = jnp.zeros((5, 2, 8)), jnp.zeros((5, 1, 4))
    rotate(turned, narrow, narrow)
    with pytest.raises(jaxtyping.TypeCheckError):
        rotate(turned, narrow, narrow[:3])
