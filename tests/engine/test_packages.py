"""Arrows between the engine's packages, read from the source: the runner knows arrays, and no store, no requests."""

import ast
from pathlib import Path

import pytest

import kvjax.engine

ENGINE = Path(kvjax.engine.__file__).parent
CORE = {"config", "request"}  # frozen data that every package may know
ALLOWED = {
    "text": CORE,
    "device": CORE,
    "kv": CORE | {"device"},
    "sessions": CORE | {"device", "kv", "active_request"},
    "scheduling": CORE | {"device", "kv", "sessions", "active_request", "stats"},
    "startup": CORE | {"device", "kv", "sessions", "scheduling", "host_memory"},
}


def imports(path: Path) -> set[str]:
    """Names of all modules of the library that a file imports from."""
    nodes = ast.walk(ast.parse(path.read_text()))
    froms = {f"{node.module}.{name.name}" for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names}
    return {name for name in froms if name.startswith("kvjax.")}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_knows_only_what_lies_below_it(package):
    files = sorted((ENGINE / package).glob("*.py"))
    assert len(files) > 1
    for file in files:
        parts = {name.split(".")[2] for name in imports(file) if name.startswith("kvjax.engine.")}
        assert parts <= ALLOWED[package] | {package}, file.name


@pytest.mark.parametrize("module", ["runner", "prefill", "steps", "split_model", "occupancy"])
def test_what_owns_arrays_knows_no_store_and_no_requests(module):
    known = imports(ENGINE / "device" / f"{module}.py")
    assert not [name for name in known if name.startswith(("kvjax.store", "kvjax.engine.request"))]


def test_the_policy_knows_no_arrays_no_threads_and_no_clock():
    for module in ("scheduler", "work"):
        tree = ast.parse((ENGINE / "scheduling" / f"{module}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names <= {"collections", "collections.abc", "dataclasses", "typing", "kvjax.engine.scheduling.work"}
