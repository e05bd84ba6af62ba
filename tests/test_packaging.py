"""kvjax.models and kvjax.configs import from a checkout, an editable install, a wheel and an sdist.

In the checkout they are links to top-level folders; in an archive they must be folders, and the top-level
ones must be absent, or they would fight with any user's own `models`. Each wheel is used from a folder that
holds exactly that: a user's `models` and `configs`.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
LINKED = ("models", "configs")
DATA = {".yaml", ".json", ".html", ".safetensors", ".txt", ".csv", ".typed"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(target: str, source: Path, out: Path) -> Path:
    """The archive that `target` (wheel or sdist) of `source` gives; no network, no isolation."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", out, cwd=source)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has, or would take, as it is now: an editor that saves meanwhile makes no difference."""
    copy = tmp_path_factory.mktemp("snapshot")
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in [name for name in names if name and os.path.lexists(ROOT / name)]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def expected_files(snapshot: Path) -> set[str]:
    """Code and data of a checkout, at the paths where an archive has them."""
    found = set()
    for folder in ("kvjax", *LINKED):
        for path in (snapshot / folder).rglob("*"):
            if path.is_file() and (path.suffix == ".py" or path.suffix in DATA):
                name = path.relative_to(snapshot).as_posix()
                found.add(name if folder == "kvjax" else f"kvjax/{name}")
    return found


@pytest.fixture(scope="module")
def wheel(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", snapshot, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(snapshot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", snapshot, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A user's project with packages called as ours are, and a script that uses both."""
    project = tmp_path / "project"
    for name in LINKED:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("MINE = True\n")
    (project / "models" / "mine.py").write_text(
        textwrap.dedent("""
        from pathlib import Path

        import configs
        import kvjax
        import kvjax.configs
        import kvjax.models
        import models

        assert models.MINE and configs.MINE
        home = Path(kvjax.__file__).parent
        for ours in (kvjax.models, kvjax.configs):
            assert home in Path(ours.__file__).parents, ours
            assert not hasattr(ours, "MINE"), ours
        print(home)
        """)
    )
    return project


def fresh_venv(path: Path, wheel: Path, *options: str | Path) -> Path:
    run(sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, path, cwd=path.parent)
    python = path / "bin" / "python"
    run(sys.executable, "-m", "uv", "pip", "install", "--python", python, *options, wheel, cwd=path.parent)
    return python


def borrow_dependencies(python: Path) -> None:
    """Let a venv see what this process has installed; not its .pth files, so not its editable kvjax."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = python.parents[1] / "lib" / version / "site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")


def test_wheel_holds_the_library_with_its_data_and_nothing_else(wheel, snapshot):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    stray = {name for name in names if not name.startswith(("kvjax/", "kvjax-")) or "__pycache__" in name}
    assert not stray
    assert not {name for name in names if "/tests/" in name or Path(name).name.startswith("test_")}
    expected = expected_files(snapshot)
    assert len(expected) > 30
    assert expected <= names, f"missing from the wheel: {sorted(expected - names)}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_the_links_as_folders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for folder in LINKED:
            assert archive.getinfo(f"kvjax/{folder}/__init__.py")
            assert f"kvjax/{folder}" not in archive.namelist()


def test_a_user_with_folders_of_those_names_gets_both(wheel, user_folder, tmp_path):
    python = fresh_venv(tmp_path / "venv", wheel, "--no-deps", "--offline")
    borrow_dependencies(python)
    home = run(python, "-m", "models.mine", cwd=user_folder).strip()
    assert Path(home).is_relative_to(tmp_path / "venv")
    run(
        python,
        "-c",
        "import kvjax.attention.dense, kvjax.models.decoder",
        cwd=user_folder,
        JAX_PLATFORMS="cpu",
    )


def test_sdist_gives_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert not (source / "models").exists()
    again = build("wheel", source, tmp_path / "again")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(again) as theirs:
        record = {name for name in ours.namelist() if name.endswith("/RECORD")}
        assert set(ours.namelist()) == set(theirs.namelist())
        for name in set(ours.namelist()) - record:
            assert ours.read(name) == theirs.read(name), name


def test_the_editable_install_and_the_checkout_agree(user_folder):
    home = run(sys.executable, "-m", "models.mine", cwd=user_folder).strip()
    assert Path(home).samefile(ROOT / "kvjax")
    for folder in LINKED:
        assert (ROOT / "kvjax" / folder).is_symlink()
        assert (ROOT / "kvjax" / folder).samefile(ROOT / folder)


def test_one_version():
    import kvjax

    assert importlib.metadata.version("kvjax") == kvjax.__version__


@pytest.mark.slow
def test_fresh_install_with_its_own_dependencies(wheel, user_folder, tmp_path):
    """Slow: installs jax, transformers and the rest; needs a package index, or uv's cache filled."""
    python = fresh_venv(tmp_path / "venv", wheel, "--constraints", ROOT / "constraints.txt")
    home = run(python, "-m", "models.mine", cwd=user_folder).strip()
    assert Path(home).is_relative_to(tmp_path / "venv")
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("attention", "engine", "models", "store", "serve")
        for path in (ROOT / "kvjax" / folder).glob("[a-z]*.py")
    )
    run(python, "-c", "import " + ", ".join(modules), cwd=user_folder, JAX_PLATFORMS="cpu")
    assert "serve" in run(python.parent / "kvjax-serve", "--help", cwd=user_folder, JAX_PLATFORMS="cpu")
