"""Attention over whole views: every case in every implementation."""

import numpy as np
import pytest

from kvjax.pallas.decode_attention import decode_attention
from tests.attention import rocketkv_oracle as oracle
from tests.pallas.cases import CASES, Case
from tests.pallas.interpreter import run


def expected(case: Case) -> np.ndarray:
    out = np.zeros(case.q.shape)
    for slot, held in enumerate(case.entries):
        for head in range(case.kv_heads if held else 0):
            at = (slot, head)
            out[at] = oracle.attend(case.q[at], case.keys[at], case.values[at], list(range(held)), case.scale)
    return out


class DecodeAttention:
    implementation: str

    def unserved(self, case: Case) -> str | None:
        """What an implementation says to a case that it does not serve."""
        return None

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_output_is_the_oracles(self, case: Case):
        q = case.q.reshape(len(case.entries), -1, case.dim)
        arrays = case.array(q), case.array(case.keys), case.array(case.values), case.held
        reason = self.unserved(case)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=reason):
                run(self.implementation, decode_attention, *arrays, scale=case.scale)
            return
        got = run(self.implementation, decode_attention, *arrays, scale=case.scale)
        rounding = 2e-5 if case.dtype == "float32" else 2**-7
        np.testing.assert_allclose(got.reshape(case.q.shape), expected(case), rtol=rounding, atol=rounding)


class TestReference(DecodeAttention):
    implementation = "reference"


class TestTpu(DecodeAttention):
    implementation = "tpu"

    def unserved(self, case: Case) -> str | None:
        return "head_dim=64" if case.dim == 64 else None


class TestGpu(DecodeAttention):
    implementation = "gpu"

    def unserved(self, case: Case) -> str | None:
        return "queries of float32" if case.dtype == "float32" else None
