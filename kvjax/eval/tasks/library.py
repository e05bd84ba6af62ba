"""The standard library's own source: Python text that every machine has, to learn from and to be tested on.

Whole packages are held out from training, so that completion can be measured on code the model never saw. Tests,
generated tables and tools nobody imports are left out: they are most of the bytes and little of the language.
"""

import sysconfig
from pathlib import Path

HELD_OUT = ("asyncio", "email", "http", "json", "logging")
LEFT_OUT = (
    "__phello__",
    "config-",
    "ctypes/macholib",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3/tests",
    "pydoc_data",
    "site-packages",
    "test",
    "turtledemo",
    "unittest/test",
)


def standard_library(*, held_out: bool = False, root: Path | None = None) -> list[tuple[str, str]]:
    """The library's source files as (relative path, text), sorted by path.

    Args:
        held_out: the files of the `HELD_OUT` packages instead of all others.
        root: the library's folder; the running interpreter's by default.

    Raises:
        FileNotFoundError: `root` holds no Python source (a frozen or stripped interpreter).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(LEFT_OUT) or (name.split("/")[0].removesuffix(".py") in HELD_OUT) != held_out:
            continue
        files.append((name, path.read_text(encoding="utf-8", errors="ignore")))
    if not files:
        raise FileNotFoundError(f"no Python source under {root}: give the folder of a full standard library")
    return files
