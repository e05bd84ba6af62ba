"""Sizes as people write them, in tokens or in bytes. As vLLM reads them: 32k is 32,000 and 32K is 32,768."""

import re

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_BYTES = {
    f"{letter}{unit}": (1024 if unit == "iB" else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for unit in ("iB", "B")
}


def size(text: str) -> int:
    """`32768`, `32k` (32,000), `32K` (32,768) or `1.5m` as a number of tokens. Raises ValueError."""
    return _scaled(text, _SCALES, "not a size: write 32768, 32k (32,000) or 32K (32,768)", "tokens")


def memory(text: str) -> int:
    """`4GiB`, `4G` (the same), `4GB` (4,000,000,000) or `0` as a number of bytes. Raises ValueError."""
    message = "not a size of memory: write 4GiB, 512MiB or 0"
    return _scaled(text, _SCALES | _BYTES, message, "bytes")


def _scaled(text: str, scales: dict[str, int], message: str, unit: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", text.replace(",", "").replace("_", ""))
    if match is None or match[2] not in scales:
        raise ValueError(message)
    value = float(match[1]) * scales[match[2]]
    if not value.is_integer():
        raise ValueError(f"not a whole number of {unit}")
    return int(value)


def show_size(nbytes: int | float) -> str:
    """Bytes as people read them: '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
