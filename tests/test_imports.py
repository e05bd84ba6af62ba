"""The shape of the library: no circles of imports, few floors in a package, no class beyond one idea."""

from pathlib import Path

import pytest

from scripts.imports import Library, Module, components, longest_chain, main, short

ROOT = Path(__file__).parents[1]
LONGEST_CLASS = 250  # lines; past that a class has a second idea, which deserves a class
# Longer ones, which may only shrink; at LONGEST_CLASS they leave this table.
LONG_CLASSES = {
    "store.load_queue.LoadQueue": 327,
    "engine.device.runner.Runner": 273,
    "store.disk.DiskTier": 261,
}
# The longest chain of imports inside each package. A longer one means that a reader of its top has more to know.
FLOORS = {
    "__main__": 1,
    "attention": 8,
    "budget": 4,
    "cache": 1,
    "configs": 1,
    "engine": 16,
    "eval": 15,
    "identity": 1,
    "models": 11,
    "pallas": 4,
    "plan": 8,
    "search": 12,
    "serve": 13,
    "store": 12,
    "train": 7,
}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.read(ROOT)


def test_modules_do_not_import_one_another(library):
    assert len(library.modules) > 200
    assert not library.circles(), "move what both need into a module below them"


def test_packages_have_few_floors(library):
    chains = {short(package): library.chain(package) for package in library.packages()}
    assert chains.keys() == FLOORS.keys()
    high = {name: " > ".join(map(short, chain)) for name, chain in chains.items() if len(chain) > FLOORS[name]}
    assert not high, "longer than FLOORS: take the import out, or pass what is imported as an argument"


def test_classes_have_one_idea(library):
    sizes = {short(name): lines for lines, name in library.classes()}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        classes = Module.parse(module, path.read_text(), "benchmarks").classes
        sizes |= {f"{module}.{name}": lines for name, lines in classes.items()}
    long = {name: size for name, size in sizes.items() if size > LONG_CLASSES.get(name, LONGEST_CLASS)}
    assert not long, f"over {LONGEST_CLASS} lines: split them by idea"
    done = [name for name in LONG_CLASSES if sizes.get(name, 0) <= LONGEST_CLASS]
    assert not done, "short enough by now: take them out of LONG_CLASSES"


def library_of(**sources: str) -> Library:
    """A package `kvjax.p` of modules a, b, c ..., and its `__init__` as `init`."""
    modules = {}
    for name, source in sources.items():
        full = "kvjax.p" if name == "init" else f"kvjax.p.{name}"
        modules[full] = Module.parse(full, source, "kvjax.p")
    return Library.of(modules)


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"a": "import kvjax.p.b", "b": "from kvjax.p import a"}, "a b"),
        (
            {"a": "from kvjax.p.b import X", "b": "def f():\n    from kvjax.p.c import Y", "c": "from . import a"},
            "a b c",
        ),
        ({"init": "from kvjax.p.a import X", "a": "from kvjax.p import X"}, " a"),
        ({"a": "from .b import X", "b": "import kvjax.p.a as other"}, "a b"),
        ({"init": "from kvjax.p.a import X", "a": "from kvjax.p import b", "b": ""}, None),
        ({"a": "from kvjax.p import b, c", "b": "from kvjax.p import c", "c": "import jax"}, None),
    ],
)
def test_circles_are_seen(sources, circle):
    expected = [] if circle is None else [[f"kvjax.p.{name}".rstrip(".") for name in circle.split(" ")]]
    assert library_of(**sources).circles() == expected


def test_the_longest_chain_counts_a_circle_once():
    edges = {name: frozenset(targets) for name, targets in {"a": "bd", "b": "c", "c": "b", "d": "e", "e": ""}.items()}
    assert sorted(map(sorted, components(edges))) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert longest_chain(edges) == ["a", "d", "e"]


def test_the_command_prints_packages_and_arrows(capsys):
    main(["--root", str(ROOT)])
    text = capsys.readouterr().out
    assert all(f"\n{package} " in text for package in FLOORS)
    assert "longest classes:" in text
    main(["--root", str(ROOT), "--mermaid"])
    assert "  serve -->" in capsys.readouterr().out
    main(["--root", str(ROOT), "--chain", "budget"])
    assert capsys.readouterr().out.startswith("kvjax.budget")
