"""Allocators: ways to find a candidate, by asking for evaluations of some."""
