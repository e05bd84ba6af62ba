"""What every file of results says besides its figures: when, on what, and by which command."""

import datetime
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any


def write_report(path: pathlib.Path, command: str, rows: Sequence[Mapping[str, Any]], packages: Sequence[str]) -> None:
    """Writes `rows` as JSON with the date, the hardware and the versions of `packages`."""
    import jax

    report = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "hardware": {"device": jax.devices()[0].device_kind, "processor": _processor(), "cores": os.cpu_count()},
        "versions": {package: version(package) for package in packages},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
