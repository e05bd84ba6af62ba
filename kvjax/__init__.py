"""Long-context inference in JAX: the full KV cache lives in a store, the device holds a small view of it."""

__version__ = "0.1.0"
