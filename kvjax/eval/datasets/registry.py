"""Loaders of published benchmarks by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.gsm8k import load_gsm8k
from kvjax.eval.datasets.longbench import load_longbench
from kvjax.eval.datasets.repobench import load_repobench
from kvjax.eval.datasets.ruler import load_ruler
from kvjax.eval.datasets.scbench import load_scbench

LOADERS: dict[str, Callable[..., DataSet]] = {
    "ruler": load_ruler,
    "longbench": load_longbench,
    "scbench": load_scbench,
    "gsm8k": load_gsm8k,
    "repobench": load_repobench,
}


def load(benchmark: str, path: Path, **settings: Any) -> DataSet:
    """The data set in the file `path` of a benchmark; `settings` are those of its loader in `LOADERS`.

    Raises:
        KeyError: there is no such benchmark; the message lists all.
        FileNotFoundError: there is no such file.
        LoadError: the file is not what the benchmark publishes; the message names file, line and field.
    """
    if benchmark not in LOADERS:
        raise KeyError(f"no benchmark {benchmark!r}; there are {', '.join(LOADERS)}")
    return LOADERS[benchmark](path, **settings)
