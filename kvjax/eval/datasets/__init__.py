"""Data sets: published benchmarks from local files, as tasks with the benchmark's own score. Nothing is downloaded."""

from kvjax.eval.datasets.dataset import DataSet
from kvjax.eval.datasets.registry import LOADERS, load
from kvjax.eval.datasets.rows import LoadError

__all__ = ["LOADERS", "DataSet", "LoadError", "load"]
