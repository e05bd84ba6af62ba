"""What every test runs under: float32 on one CPU device, no network, and shapes checked at run time.

The import hook makes each call in kvjax check its jaxtyping annotations, so a wrong shape fails where it is
passed and not three functions later. The persistent compilation cache stays off: a stale entry would hide
a change that no longer compiles.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda tests on that device instead
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a test that fails on a train
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and fork do not mix

import hypothesis
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
