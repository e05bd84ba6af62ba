"""Import graph of the library: sizes, circles and floors of each package, and the longest classes.

    python -m scripts.imports [--root DIR] [--mermaid]

A *circle* is a set of modules that import one another, at the top of a file or inside a function. The *rooms* of a
package are the modules and packages directly in it. Its *floors* are the modules on the longest chain of imports that
stays inside the package; a circle is one floor.
"""

import argparse
import ast
import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

FOLDERS = {"kvjax": "", "models": "kvjax.", "configs": "kvjax."}  # a folder, and what its modules are imported below
Edges = Mapping[str, frozenset[str]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A source file.

    Attributes:
        imports: dotted names as they stand in the file, those of modules and of what is in them.
        classes: lines of each class.
    """

    name: str
    lines: int
    imports: frozenset[str]
    classes: Mapping[str, int]

    @classmethod
    def parse(cls, name: str, source: str, package: str) -> Self:
        """Of a file in `package`."""
        tree = ast.parse(source)
        classes = {
            node.name: (node.end_lineno or node.lineno) - node.lineno + 1
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }
        return cls(name, source.count("\n"), frozenset(imported(tree, package)), classes)


@dataclasses.dataclass(frozen=True)
class Library:
    """Modules by their dotted name, and which of them each imports.

    Attributes:
        edges: a module that imports a name from a package imports the module of that name, or the package.
    """

    modules: Mapping[str, Module]
    edges: Edges

    @classmethod
    def read(cls, root: pathlib.Path) -> Self:
        """Reads every Python file of the checkout at `root`; links are not followed."""
        modules = {}
        for folder, above in FOLDERS.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                linked = any((root / pathlib.Path(*parts[:depth])).is_symlink() for depth in range(1, len(parts)))
                if not linked:
                    name, package = (above + ".".join(parts)).removesuffix(".__init__"), above + ".".join(parts[:-1])
                    modules[name] = Module.parse(name, path.read_text(), package)
        return cls.of(modules)

    @classmethod
    def of(cls, modules: Mapping[str, Module]) -> Self:
        edges = {}
        for name, module in modules.items():
            targets = {nearest(imported, modules) for imported in module.imports}
            edges[name] = frozenset(target for target in targets if target and target != name)
        return cls(modules, edges)

    def packages(self) -> list[str]:
        """The packages directly below kvjax, and its modules that are in none."""
        return sorted({".".join(name.split(".")[:2]) for name in self.modules if name != "kvjax"})

    def inside(self, package: str) -> dict[str, Module]:
        return {name: module for name, module in self.modules.items() if within(name, package)}

    def rooms(self, package: str) -> set[str]:
        depth = package.count(".") + 2
        return {".".join(name.split(".")[:depth]) for name in self.inside(package) if name != package}

    def chain(self, package: str) -> list[str]:
        """The longest chain of imports inside a package, from the top down; a circle is one link of it."""
        return longest_chain({name: self.edges[name] & set(self.inside(package)) for name in self.inside(package)})

    def circles(self) -> list[list[str]]:
        return [sorted(part) for part in components(self.edges) if len(part) > 1]

    def arrows(self) -> dict[tuple[str, str], int]:
        """Imports from one package to another."""
        pairs = collections.Counter()
        for name, targets in self.edges.items():
            for target in targets:
                pair = tuple(".".join(each.split(".")[:2]) for each in (name, target))
                pairs[pair] += pair[0] != pair[1] and "kvjax" not in pair
        return {pair: count for pair, count in sorted(pairs.items()) if count}

    def classes(self) -> list[tuple[int, str]]:
        """Lines and name of every class, the longest first."""
        sizes = [(lines, f"{m.name}.{name}") for m in self.modules.values() for name, lines in m.classes.items()]
        return sorted(sizes, reverse=True)


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a file in `package` imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def nearest(name: str, modules: Mapping[str, Module]) -> str | None:
    """The module that `name` is, or that holds it."""
    while name not in modules:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def components(edges: Edges) -> list[frozenset[str]]:
    """Sets of modules that reach one another (Tarjan), each after those that it imports."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            first = stack.index(node)
            found.append(frozenset(stack[first:]))
            del stack[first:]

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def longest_chain(edges: Edges) -> list[str]:
    """Of an acyclic graph of components; each is called by its first module."""
    below: dict[str, list[str]] = {}
    for part in components(edges):
        targets = {target for name in part for target in edges[name]} - part
        chain = [min(part), *max((below[target] for target in sorted(targets)), key=len, default=[])]
        below.update(dict.fromkeys(part, chain))
    return max(below.values(), key=len, default=[])


def table(library: Library) -> Iterator[str]:
    """The picture as lines of text."""
    circles = library.circles()
    yield f"{'package':<14}{'rooms':>6}{'files':>7}{'lines':>8}{'floors':>8}{'circles':>9}   imports"
    arrows = library.arrows()
    for package in library.packages():
        inside = library.inside(package)
        lines, floors = sum(module.lines for module in inside.values()), len(library.chain(package))
        rounds = sum(1 for circle in circles if within(circle[0], package))
        below = " ".join(short(target) for source, target in arrows if source == package)
        rooms = len(library.rooms(package))
        row = f"{short(package):<14}{rooms or '':>6}{len(inside):>7}{lines:>8,}{floors:>8}{rounds:>9}   {below}"
        yield row.rstrip()
    lines = sum(module.lines for module in library.modules.values())
    yield f"{'in all':<20}{len(library.modules):>7}{lines:>8,}{'':>8}{len(circles):>9}"
    yield from (f"circle: {' <-> '.join(map(short, circle))}" for circle in circles)
    yield "longest classes:"
    yield from (f"{lines:>6}  {short(name)}" for lines, name in library.classes()[:10])


def mermaid(library: Library) -> Iterator[str]:
    """The arrows between packages as a Mermaid graph, with the number of imports on each."""
    yield "graph TD"
    yield from (f"  {short(a)} -->|{count}| {short(b)}" for (a, b), count in library.arrows().items())


def short(name: str) -> str:
    return name.removeprefix("kvjax.")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m scripts.imports", description="print the import graph of the library")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(), help="a checkout (default: this folder)")
    parser.add_argument("--mermaid", action="store_true", help="the arrows between packages, as Mermaid draws them")
    parser.add_argument("--chain", metavar="PACKAGE", help="the longest chain of imports inside a package")
    options = parser.parse_args(None if arguments is None else list(arguments))
    library = Library.read(options.root)
    if options.chain:
        print(*library.chain(f"kvjax.{options.chain}"), sep="\n")
    else:
        print(*(mermaid if options.mermaid else table)(library), sep="\n")


if __name__ == "__main__":
    main()
