"""Retained tokens: the choice of a cache's method for one prompt, measured and drawn. Importing it imports JAX."""

from kvjax.eval.retained.retained import Retained, masks, retained_share, spans

__all__ = ["Retained", "masks", "retained_share", "spans"]
