"""Sizes as people write and read them."""

import argparse
import re

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of '20GiB', '512MiB', '1.5G' or '4096'; units are powers of 1024.

    Raises:
        argparse.ArgumentTypeError: it is no size.
    """
    match = WRITTEN.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 20GiB, 512MiB or 1.5G")
    return int(float(match[1]) * UNITS[match[2].upper()])


def show_size(nbytes: int | float) -> str:
    """Bytes as people read them: '1.50 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
