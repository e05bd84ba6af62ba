"""Measurements of the model that ships, which its card quotes: retrieval, eviction, code, and the training curve."""
