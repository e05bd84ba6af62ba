"""Accuracy of compression methods at equal token budgets: `python -m benchmarks.methods`."""
