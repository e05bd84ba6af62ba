"""Observation scores: every case in every implementation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.pallas.observation_scores import observation_scores
from tests.attention import rocketkv_oracle as oracle
from tests.pallas.cases import Case, slow
from tests.pallas.interpreter import run


@dataclasses.dataclass(frozen=True)
class Prompt(Case):
    """One prompt: its keys, NaN behind its end, and its last queries, NaN where they do not count."""

    window: int = 32
    observed: int = 32
    pooling_kernel: int = 7
    per_head: bool = False

    def __str__(self) -> str:
        kind = "-per-head" if self.per_head else ""
        return f"{super().__str__()}-t{self.length}-w{self.window}-o{self.observed}{kind}"

    @property
    def length(self) -> int:
        return self.entries[0]

    @property
    def queries(self) -> np.ndarray:
        """[W, H, D]."""
        drawn = self.draw(3, self.window, self.kv_heads * self.group, self.dim)
        drawn[: self.window - self.observed] = np.nan
        return drawn


# Lengths and rooms at the edges of tiles and blocks, of 64 keys on a GPU and 1024 on a TPU.
PROMPTS = [
    Prompt(4, 128, 8, 640, (203,), window=16, observed=16),
    Prompt(3, 128, 8, 72, (9,), window=12, observed=5, per_head=True),
    Prompt(2, 128, 8, 130, (130,), dtype="float32", window=8, observed=3, pooling_kernel=1),
    slow(Prompt(2, 128, 8, 32, (32,), window=32, observed=31)),
    slow(Prompt(4, 128, 8, 1100, (1025,), window=32, observed=32, pooling_kernel=63)),
    slow(Prompt(4, 128, 8, 1100, (1100,), kv_heads=2, window=32, observed=20, per_head=True)),
    slow(Prompt(1, 64, 8, 257, (192,), kv_heads=2, window=32, observed=32)),
    slow(Prompt(4, 128, 8, 2112, (2049,), window=128, observed=128)),
]


class ObservationScores:
    implementation: str

    def unserved(self, case: Prompt) -> str | None:
        """What an implementation says to a case that it does not serve."""
        return None

    def scores(self, case: Prompt) -> np.ndarray:
        arrays = case.array(case.queries), case.array(case.keys[0]), jnp.int32(case.length), jnp.int32(case.observed)
        options = {"pooling_kernel": case.pooling_kernel, "scale": case.scale, "per_head": case.per_head}
        return run(self.implementation, observation_scores, *arrays, **options)

    @pytest.mark.parametrize("case", PROMPTS, ids=str)
    def test_scores_are_the_oracles(self, case: Prompt):
        reason = self.unserved(case)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=reason):
                self.scores(case)
            return
        want = oracle.stage1_scores(
            case.queries,
            case.keys[0],
            case.length,
            case.observed,
            case.scale,
            case.pooling_kernel,
            case.per_head,
        )
        got = self.scores(case)
        assert got.shape == (len(want), case.capacity)
        np.testing.assert_allclose(got[:, : case.length - case.observed], want, rtol=3e-5, atol=1e-9)

    def test_more_queries_than_there_is_room_for_are_refused(self):
        case = Prompt(8, 128, 8, 640, (600,), window=520, observed=1)
        if self.implementation == "reference":
            assert np.isfinite(self.scores(case)[:, :599]).all()
            return
        with pytest.raises(NotImplementedError, match="4160 queries"):
            self.scores(case)


class TestReference(ObservationScores):
    implementation = "reference"


class TestTpu(ObservationScores):
    implementation = "tpu"

    def unserved(self, case: Prompt) -> str | None:
        return "head_dim=64" if case.dim == 64 else None


class TestGpu(ObservationScores):
    implementation = "gpu"

    def unserved(self, case: Prompt) -> str | None:
        return "queries of float32" if case.dtype == "float32" else None
