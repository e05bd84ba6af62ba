"""Digests of files that are large and seldom change: the weights of a model, of which every key speaks.

A file is read once; its digest is kept with its size, times and a sample of its bytes, so the next start does not read
16 GB for a hash. The time of a file's last change of any kind (ctime) cannot be set back as that of its contents can,
and where a file system does not keep it, a file rewritten in place is seen by its sample.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 22
DIGEST = re.compile(r"[0-9a-f]{64}")
SAMPLES, SAMPLE = 32, 4096  # parts of a file, evenly spread, and bytes of each: what is read at every start
Known = dict[str, dict[str, str]]  # of each path the version and the SHA-256


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
        place, version = str(path.resolve()), _version(path)
        if known.get(place, {}).get("version") != version:
            known[place] = {"version": version, "sha256": _digest(path)}
        whole.update(f"{path.name}\0{known[place]['sha256']}\n".encode())
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


def _version(path: Path) -> str:
    """What differs after a file has changed; taken before the file is read, so a change meanwhile is seen later."""
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        sample = hashlib.sha256()
        for index in range(SAMPLES):
            sample.update(os.pread(file.fileno(), SAMPLE, max(stat.st_size - SAMPLE, 0) * index // (SAMPLES - 1)))
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}:{sample.hexdigest()[:32]}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read(cache: Path | None) -> Known:
    """Entries of the cache, without those of another form."""
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {place: entry for place, entry in known.items() if _is_entry(entry)} if isinstance(known, dict) else {}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"version", "sha256"}:
        return False
    return all(isinstance(value, str) for value in entry.values()) and bool(DIGEST.fullmatch(entry["sha256"]))


def _write(cache: Path | None, known: Known) -> None:
    """By rename, so that two servers that start together never read half a file. A cache that fails costs time only."""
    if cache is None:
        return
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=cache.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1)
        os.replace(temporary, cache)
