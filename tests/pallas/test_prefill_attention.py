"""Attention of a chunk of a prompt: every case in every implementation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas.prefill_attention import prefill_attention
from tests.attention import oracle
from tests.pallas.cases import Case, slow
from tests.pallas.interpreter import run


@dataclasses.dataclass(frozen=True)
class Chunk(Case):
    """A chunk of a prompt, its last keys its own, and NaN behind them."""

    chunk: int = 128
    window: int | None = None

    def __str__(self) -> str:
        width = "" if self.window is None else f"-w{self.window}"
        return f"{super().__str__()}-p{self.chunk}-at{self.start}{width}"

    @property
    def start(self) -> int:
        return self.entries[0] - self.chunk

    @property
    def queries(self) -> np.ndarray:
        """[P, H, D]."""
        return self.draw(3, self.chunk, self.kv_heads * self.group, self.dim)


# Starts at 0, in the middle, and where the chunk fills the workspace; at the edges of tiles, of 128 keys on a GPU and
# 1024 on a TPU, and between them; windows that end inside a tile, at its edge, and before the first key.
CHUNKS = [
    Chunk(4, 128, 8, 512, (128,)),
    Chunk(3, 128, 8, 304, (304,)),
    Chunk(1, 128, 8, 150, (131,)),
    Chunk(1, 128, 8, 400, (384,), kv_heads=2, window=129),
    Chunk(2, 128, 8, 48, (41,), dtype="float32", chunk=24),
    Chunk(2, 128, 8, 32, (32,), chunk=32),  # a short prompt in a workspace of its own length
    Chunk(2, 128, 8, 160, (130,), chunk=40),
    slow(Chunk(1, 64, 8, 500, (392,), kv_heads=2)),
    slow(Chunk(4, 128, 8, 192, (192,), chunk=192, window=70)),
    slow(Chunk(4, 128, 8, 1536, (1152,), chunk=256)),
    slow(Chunk(3, 128, 8, 2200, (2113,), chunk=128)),
    slow(Chunk(1, 128, 8, 1300, (1280,), chunk=256, window=1)),
    slow(Chunk(3, 128, 8, 1300, (1168,), chunk=128, window=100)),
    slow(Chunk(4, 128, 8, 2304, (2304,), chunk=128, window=1100)),
    slow(Chunk(1, 128, 8, 640, (640,), chunk=640, window=5000)),
]


class PrefillAttention:
    implementation: str

    def unserved(self, case: Chunk) -> str | None:
        """What an implementation says to a case that it does not serve."""
        return None

    def serves_start(self, case: Chunk) -> bool:
        return True

    def attend(self, case: Chunk) -> np.ndarray:
        arrays = case.array(case.queries), case.array(case.keys[0]), case.array(case.values[0]), jnp.int32(case.start)
        return run(self.implementation, prefill_attention, *arrays, scale=case.scale, window=case.window)

    @pytest.mark.parametrize("case", CHUNKS, ids=str)
    def test_output_is_the_oracles(self, case: Chunk):
        reason = self.unserved(case)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=reason):
                self.attend(case)
            return
        if not self.serves_start(case):  # which is known too late for a reason
            assert np.isnan(self.attend(case)).all()
            return
        keys, values = case.keys[0], case.values[0]
        want = oracle.prefill(case.queries, keys, values, case.start, case.scale, case.window)
        rounding = 2e-5 if case.dtype == "float32" else 2**-7
        np.testing.assert_allclose(self.attend(case), want, rtol=rounding, atol=rounding)


class TestReference(PrefillAttention):
    implementation = "reference"


class TestTpu(PrefillAttention):
    implementation = "tpu"

    def unserved(self, case: Chunk) -> str | None:
        return "head_dim=64" if case.dim == 64 else None


class TestGpu(PrefillAttention):
    implementation = "gpu"

    def unserved(self, case: Chunk) -> str | None:
        if case.dtype == "float32":
            return "queries of float32"
        return "a chunk of 40 queries" if case.chunk == 40 else None

    def serves_start(self, case: Chunk) -> bool:
        return case.start % 8 == 0
