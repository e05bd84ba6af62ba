"""Host memory: bytes that are free on this machine, and how many of them the KV store takes by default."""

from collections.abc import Iterator
from pathlib import Path

from kvjax.store.keys import BLOCK_TOKENS

SHARE = 4  # the store takes at most one part in so many of the free memory
LEAST_BLOCKS = 64
SPARE_PROMPTS = 2  # beyond one a slot: for prompts that come again
UNKNOWN = 4 << 30  # bytes taken for free where the machine does not say


def auto_host_cache_size(block_bytes: int, max_model_len: int, max_num_seqs: int, available: int | None) -> int:
    """Bytes of host memory for the KV of `max_num_seqs + SPARE_PROMPTS` prompts as long as the context.

    At most a quarter of what is available, and at least `LEAST_BLOCKS` blocks.

    Args:
        block_bytes: of one block in host memory.
        available: bytes that are free on the host; None where it does not say.
    """
    blocks = prompt_blocks(max_model_len) * (max_num_seqs + SPARE_PROMPTS)
    most = (UNKNOWN if available is None else available) // SHARE // block_bytes
    return max(min(blocks, most), LEAST_BLOCKS) * block_bytes


def prompt_blocks(max_model_len: int) -> int:
    """Blocks of a prompt as long as the context."""
    return -(-max_model_len // BLOCK_TOKENS)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process can still take: what is free, within the limits of its control groups.

    None if this machine does not say.

    Args:
        root: of the file system that has `proc` and `sys`.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return max(min([free, *_cgroup_memory(root)]), 0)


def _cgroup_memory(root: Path) -> Iterator[int]:
    """Bytes below the limit of each control group that this process is in, of version 2 or 1."""
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for entry in entries:
        if len(entry) != 3:
            continue
        _, controllers, path = entry
        if controllers == "":
            folder, limit, used, idle = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            idle = "total_inactive_file"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):  # a limit holds for the groups within; some are hidden in a container
            try:
                most, taken = (int((folder / group / name).read_text()) for name in (limit, used))
                statistics = (folder / group / "memory.stat").read_text().split()
            except (OSError, ValueError):  # "max" is no limit
                continue
            cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(idle, "0")
            yield most - taken + int(cached)  # the page cache makes way
