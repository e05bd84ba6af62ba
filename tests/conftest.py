"""What every test runs under: float32 on one CPU device, no network, and shapes checked at run time.

The import hook makes each call in kvjax check its jaxtyping annotations, so a wrong shape fails where it is
passed and not three functions later. The persistent compilation cache stays off: XLA's CPU backend has ended a process
while it wrote an entry, and cold it saves little beside what stays compiled within a process.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda tests on that device instead
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a test that fails on a train
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and fork do not mix

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("kvjax", "beartype.beartype")

# Compiling makes the first example slow whatever it is, so time says nothing about an example.
SLOW_START = [hypothesis.HealthCheck.too_slow]
# Every run of `make test` sees the same examples: a red run is then the change's fault.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50, print_blob=True, suppress_health_check=SLOW_START
)
# `make nightly` looks for new ones.
hypothesis.settings.register_profile(
    "nightly", deadline=None, max_examples=500, print_blob=True, suppress_health_check=SLOW_START
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Files whose engines are laid out alike: the first one compiles for the others.
ALIKE = {
    "layout of the shared engine": (
        "tests/engine/test_methods.py",
        "tests/engine/test_token_budget.py",
        "tests/search/test_served.py",
    ),
    "layout of test_prefix": (
        "tests/engine/test_prefix.py",
        "tests/engine/test_prefix_disk.py",
        "tests/engine/test_prefix_generated.py",
        "tests/engine/test_prefix_generated_disk.py",
        "tests/store/test_served.py",
    ),
}
LONG = ("tests/engine/", "tests/end_to_end/", "tests/search/", "tests/train/")  # these begin first


def group(item: pytest.Item) -> str:
    """The name of what runs on one worker: tests of the shared engine, of engines laid out alike, or of one file."""
    if "_engine" in getattr(item, "fixturenames", ()):
        return "the shared engine"
    file = item.nodeid.split("::")[0]
    return next((name for name, files in ALIKE.items() if file in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers set up once what tests share, and neither ends with a long file that the other does not help with."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(LONG))


# Linux gives a process 65,530 memory maps. Compiled programs take some each, and XLA ends the process without.
MAPS = 20_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between groups, whose engines are not used again: frees what is compiled, once it is a lot."""
    if nextitem is not None and group(nextitem) != group(item) and memory_maps() > MAPS:
        jax.clear_caches()
        gc.collect()


def memory_maps() -> int:
    """Memory maps of this process; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0
