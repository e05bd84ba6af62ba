"""Page scores: every case in every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.pages import summarize
from kvjax.pallas.page_scores import page_scores
from tests.attention import rocketkv_oracle as oracle
from tests.pallas.cases import CASES, SUMMARIES, Case
from tests.pallas.interpreter import run


def summary(case: Case) -> np.ndarray:
    """[B, K, P, 2, D], NaN where a page has no entry."""
    filled = jnp.broadcast_to(jnp.arange(case.capacity) < case.held[:, None, None], case.keys.shape[:3])
    bounds = summarize(case.array(case.keys), filled, case.page, jnp.dtype(case.summary or case.dtype))
    pages = np.arange(case.pages) * case.page < np.array(case.entries)[:, None]
    return np.where(pages[:, None, :, None, None], np.asarray(bounds, np.float32), np.nan)


def expected(case: Case, bounds: np.ndarray) -> np.ndarray:
    """The oracle's weight of an entry of each page, by the summary as it was stored."""
    out = np.zeros((len(case.entries), case.kv_heads, case.pages))
    for slot, held in enumerate(case.entries):
        for head in range(case.kv_heads if held else 0):
            shares = []
            for query in case.q[slot, head].astype(np.float64):
                each = np.maximum(query * bounds[slot, head, :, 0], query * bounds[slot, head, :, 1]).sum(axis=1)
                shares.append(oracle.softmax(np.repeat(each, case.page)[:held] * case.scale)[:: case.page])
            out[slot, head, : len(shares[0])] = np.mean(shares, axis=0)
    return out


class PageScores:
    implementation: str

    def unserved(self, case: Case) -> str | None:
        """What an implementation says to a case that it does not serve."""
        return None

    @pytest.mark.parametrize("case", CASES + SUMMARIES, ids=str)
    def test_scores_are_the_oracles(self, case: Case):
        bounds = summary(case)
        arrays = case.array(case.q), case.array(bounds, case.summary), case.held
        reason = self.unserved(case)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=reason):
                run(self.implementation, page_scores, *arrays, page_size=case.page, scale=case.scale)
            return
        got = run(self.implementation, page_scores, *arrays, page_size=case.page, scale=case.scale)
        np.testing.assert_allclose(got, expected(case, bounds), rtol=3e-5, atol=1e-9)


class TestReference(PageScores):
    implementation = "reference"


class TestTpu(PageScores):
    implementation = "tpu"

    def unserved(self, case: Case) -> str | None:
        return "head_dim=64" if case.dim == 64 else None


class TestGpu(PageScores):
    implementation = "gpu"

    def unserved(self, case: Case) -> str | None:
        if case.dtype == "float32":
            return "queries of float32"
        return "fewer than the 64" if case.pages < 64 else None
