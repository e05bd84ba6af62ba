"""The one table of cases that every implementation of every operation runs, and the arrays of each."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of views that are NaN wherever they hold nothing."""

    group: int  # query heads of a kv head
    dim: int
    page: int
    capacity: int
    entries: tuple[int, ...]
    kv_heads: int = 1
    dtype: str = "bfloat16"
    summary: str | None = None  # the type of the pages' summary; the keys' own if None

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def pages(self) -> int:
        return self.capacity // self.page

    def __str__(self) -> str:
        heads = f"gqa{self.group}-d{self.dim}-page{self.page}-c{self.capacity}"
        return "-".join(filter(None, [heads, self.dtype, self.summary]))

    def draw(self, seed: int, *shape: int) -> np.ndarray:
        """Normal numbers that the case's type can hold, as float32."""
        drawn = np.random.default_rng(seed).normal(0, 1, shape).astype(jnp.dtype(self.dtype))
        return drawn.astype(np.float32)

    @functools.cached_property
    def q(self) -> np.ndarray:
        """[B, K, G, D]."""
        return self.draw(0, len(self.entries), self.kv_heads, self.group, self.dim)

    @functools.cached_property
    def keys(self) -> np.ndarray:
        return self._entries(1)

    @functools.cached_property
    def values(self) -> np.ndarray:
        return self._entries(2)

    def _entries(self, seed: int) -> np.ndarray:
        drawn = self.draw(seed, len(self.entries), self.kv_heads, self.capacity, self.dim)
        for slot, held in enumerate(self.entries):
            drawn[slot, :, held:] = np.nan
        return drawn

    def array(self, x: np.ndarray, dtype: str | None = None):
        return jnp.asarray(x, jnp.dtype(dtype or self.dtype))

    @property
    def held(self):
        return jnp.asarray(self.entries, jnp.int32)


def slow(case: Case) -> Any:
    """Left to `make nightly`: in an interpreter a case takes seconds."""
    return pytest.param(case, marks=pytest.mark.slow)


# At least 64 pages and 64 entries wherever a case is for the kernels of a GPU; lengths at the edges of pages and tiles.
CASES = [
    Case(4, 128, 8, 640, (0, 203, 640)),
    Case(4, 128, 4, 256, (9, 256)),
    Case(3, 128, 8, 64, (17,), dtype="float32"),
    slow(Case(1, 64, 8, 520, (1, 519), kv_heads=2)),
    slow(Case(3, 128, 16, 1040, (64, 1025))),
    slow(Case(8, 128, 8, 512, (65, 0, 512))),
]
SUMMARIES = [
    Case(4, 128, 16, 1024, (777,), summary="float8_e4m3fn"),
    slow(Case(4, 64, 8, 512, (300,), summary="float8_e4m3fn")),
]
