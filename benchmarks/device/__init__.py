"""Kernels, copies and whole decode steps on an accelerator: `python -m benchmarks.device`."""
