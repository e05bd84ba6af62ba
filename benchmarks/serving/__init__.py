"""Benchmarks of a whole server, as its clients see it."""
