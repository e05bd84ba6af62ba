"""The default size of host memory for the store: by model and slots, within a quarter of what is free."""

from pathlib import Path

import pytest

from kvjax.engine.host_memory import LEAST_BLOCKS, UNKNOWN, auto_host_cache_size, available_memory

BLOCK, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "available", "blocks"),
    [
        (8192, 4, 64 * GIB, 6 * 32),  # two prompts more than slots
        (8193, 4, 64 * GIB, 6 * 33),  # whole blocks
        (8192, 4, 4 * 100 * BLOCK, 100),  # a quarter of what is free
        (8192, 4, 4 * 100 * BLOCK - 1, 99),
        (8192, 4, 0, LEAST_BLOCKS),  # but no less than this
        (256, 1, 64 * GIB, LEAST_BLOCKS),
        (1 << 20, 16, None, UNKNOWN // 4 // BLOCK),  # a machine that does not say
    ],
)
def test_the_size_is_that_of_the_prompts_of_all_slots_and_two_more(max_model_len, max_num_seqs, available, blocks):
    assert auto_host_cache_size(BLOCK, max_model_len, max_num_seqs, available) == blocks * BLOCK


def rooted(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       16384 kB\nMemAvailable:    8192 kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def group(folder: str, limit: object, used: int, cached: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    most, current, idle = names
    return {
        f"{folder}/{most}": f"{limit}\n",
        f"{folder}/{current}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\n{idle} {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "available"),
    [
        (MEMINFO, 8 << 20),
        (MEMINFO | {"proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a/b", 5000, 2000, 500), 3500),
        (MEMINFO | {"proc/self/cgroup": "0::/a/b\n"} | group(f"{V2}/a", 5000, 2000, 0), 3000),  # of the group above
        (MEMINFO | {"proc/self/cgroup": "0::/\n"} | group(V2, 5000, 2000, 0), 3000),  # as a container sees its own
        (MEMINFO | {"proc/self/cgroup": "0::/a\n"} | group(f"{V2}/a", "max", 2000, 0), 8 << 20),
        (MEMINFO | {"proc/self/cgroup": "0::/a\n"} | group(f"{V2}/a", 5000, 6000, 0), 0),
        (MEMINFO | {"proc/self/cgroup": "4:memory:/a\n0::/\n"} | group(f"{V1}/a", 5000, 2000, 500, 1), 3500),
        (MEMINFO | {"proc/self/cgroup": "4:memory:/a\n"} | group(V1, 2**63 - 4096, 2000, 0, 1), 8 << 20),  # no limit
        (MEMINFO | {"proc/self/cgroup": "3:cpu,cpuacct:/a\nnonsense\n"}, 8 << 20),
        ({}, None),
        ({"proc/meminfo": "MemTotal: 1 kB\n"}, None),
    ],
)
def test_available_memory_is_within_every_limit(tmp_path, files, available):
    assert available_memory(rooted(tmp_path, files)) == available


def test_this_machine_says():
    assert (available_memory() or 0) > 1 << 20
