"""Digests of files that are large and seldom change: the weights of a model, of which every key speaks.

A file is read once; its digest is kept with its size and time, so the next start does not read 16 GB for a hash.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 22


def files_digest(files: Iterable[Path], cache: Path | None = None) -> str:
    """SHA-256 over the names and contents of files, in the order of their names; as hexadecimal digits.

    Args:
        cache: a JSON file of digests that are known already; made if it is not there, ignored if it cannot be read.

    Raises:
        OSError: a file cannot be read.
    """
    known = _read(cache)
    whole = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        stat = path.stat()
        place = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if place not in known:
            known[place] = _digest(path)
        whole.update(f"{path.name}\0{known[place]}\n".encode())
    _write(cache, known)
    return whole.hexdigest()


def weights_digest(folder: Path) -> str:
    """What tells the weights in a folder from all others: the digest of its configuration and tensors.

    A model that is one file has the digest of that file.

    Raises:
        OSError: a file cannot be read.
    """
    if folder.is_file():
        return files_digest([folder], known_digests())
    return files_digest([folder / "config.json", *folder.glob("*.safetensors")], known_digests())


def known_digests() -> Path:
    """Where digests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvjax" / "digests.json"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return {str(place): str(digest) for place, digest in known.items()} if isinstance(known, dict) else {}


def _write(cache: Path | None, known: dict[str, str]) -> None:
    """By rename, so that two servers that start together never read half a file. A cache that fails costs time only."""
    if cache is None:
        return
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=cache.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        os.replace(temporary, cache)
