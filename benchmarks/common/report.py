"""Record of results: rows with the date, the hardware, the versions and the command that made them."""

import datetime
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "tensorstore", "numpy")


def write_report(path: pathlib.Path, command: str, rows: Sequence[Mapping[str, Any]], packages: Sequence[str]) -> None:
    """Writes `rows` as JSON with the date, the hardware and the versions of `packages`.

    All at once: a process that is killed leaves the former file.
    """
    import jax

    report = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "hardware": {
            "device": jax.devices()[0].device_kind,
            "driver": _driver(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        },
        "versions": {package: _version(package) for package in packages},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def write_rows(path: pathlib.Path, module: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes what a command on the engine has measured so far, each row with the settings of the command."""
    command = f"python -m {module} {' '.join(sys.argv[1:])}".strip()
    write_report(path, command, [{**row, "settings": dict(settings)} for row in rows], PACKAGES)


def former_rows(path: pathlib.Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a former run of the same command; none if there is no such file.

    Raises:
        ValueError: the file is something else, or holds results of other settings.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        held = [dict(row["settings"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no rows with settings ({error!r}): choose another --output") from error
    expected = json.loads(json.dumps(settings))
    for other in held:
        if changed := [name for name in expected if other.get(name) != expected[name]]:
            name = changed[0]
            raise ValueError(
                f"{path} has results of other settings: {name} was {other.get(name)!r} and now is {expected[name]!r}. "
                "Use the former ones to go on with it, or choose another --output"
            )
    return rows


def _version(package: str) -> str | None:
    """None for one that runs from its source, without having been installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver: the kernel's module of an NVIDIA GPU, else the version that JAX has of its platform."""
    import jax

    try:
        return pathlib.Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        platform = getattr(jax.devices()[0].client, "platform_version", "")
        return platform.splitlines()[0] if platform else None


def processor_name() -> str:
    """The model of this machine's processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
