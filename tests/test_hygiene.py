"""What no file of the repository may hold: code that runs what it reads, torch, hosts of package indexes."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# A cache, a checkpoint and a request come from elsewhere: reading one must not run what it says.
RUNS_WHAT_IT_READS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN = RUNS_WHAT_IT_READS | {"torch"}
FORBIDDEN_CALLS = {"torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
MUST_BE_FALSE = {"allow_pickle", "trust_remote_code"}

# Spelled in pieces, so that this file does not fail its own test.
INDEX_HOSTS = [
    ".".join(labels)
    for labels in [
        ("pypi", "org"),
        ("python" + "hosted", "org"),
        ("npmjs", "org"),
        ("yarnpkg", "com"),
        ("anaconda", "org"),
        ("pytorch", "org/whl"),
        ("deb", "debian", "org"),
        ("crates", "io"),
    ]
]


def tracked(*suffixes: str) -> list[Path]:
    """Files that git has or would take, links not followed; all of them without `suffixes`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name]
    return [p for p in paths if p.is_file() and (not suffixes or p.suffix in suffixes)]


def library() -> list[Path]:
    return [path for path in tracked(".py") if path.relative_to(ROOT).parts[0] in ("kvjax", "models", "configs")]


def faults(source: str) -> Iterator[str]:
    """Each forbidden import or call of a library file, with its line."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            callee = ast.unparse(node.func)
            if callee.endswith(("import_module", "__import__")):
                names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            if callee in FORBIDDEN_CALLS:
                yield f"{node.lineno}: calls {callee}"
            if callee in ("np.load", "numpy.load", "jnp.load") and len(node.args) > 2:
                yield f"{node.lineno}: passes allow_pickle to {callee} by position"
            for keyword in node.keywords:
                false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in MUST_BE_FALSE and not false:
                    yield f"{node.lineno}: {keyword.arg} is not False"
        for name in names:
            if name.split(".")[0] in FORBIDDEN:
                yield f"{node.lineno}: imports {name}"


def test_the_library_neither_runs_what_it_reads_nor_imports_torch():
    wrong = [f"{path.relative_to(ROOT)}:{fault}" for path in library() for fault in faults(path.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch.nn as nn",
        "def f():\n    from torch import nn",
        "from shelve import open",
        "importlib.import_module('marshal')",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "np.load(path, None, True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=remote)",
        "yaml.load(text, yaml.Loader)",
    ],
)
def test_faults_are_seen(source):
    assert len(list(faults(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["np.load(path)", "np.load(path, allow_pickle=False)", "yaml.safe_load(x)", "import torchless"],
)
def test_harmless_code_passes(source):
    assert not list(faults(source))


def test_every_config_parses():
    for path in tracked(".yaml", ".yml"):
        content = yaml.safe_load(path.read_text())
        assert content, f"{path.relative_to(ROOT)} is empty"


def test_no_file_names_the_host_of_a_package_index():
    wrong = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore").lower()
        wrong += [f"{path.relative_to(ROOT)}: {host}" for host in INDEX_HOSTS if host in text]
    assert not wrong, "\n".join(wrong)


def test_pinned_versions_come_from_no_place_in_particular():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        assert "==" in line, f"constraints.txt: {line!r} is not name==version"
        assert not any(mark in line for mark in ("://", " @ ", "--")), f"constraints.txt: {line!r} has a place"
    names = ("package-lock.json", "pnpm-lock.yaml")
    locks = [path for path in tracked() if path.suffix == ".lock" or path.name in names]
    with_addresses = [str(path.relative_to(ROOT)) for path in locks if "://" in path.read_text()]
    assert not with_addresses, f"lock files that hold addresses: {with_addresses}"
