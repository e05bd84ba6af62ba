"""Attention over selected pages: every case in every implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.read_units import ReadUnits
from kvjax.pallas.selected_attention import selected_attention
from tests.attention import rocketkv_oracle as oracle
from tests.pallas.cases import CASES, Case
from tests.pallas.interpreter import run


def draw(case: Case, count: int, per_head: bool = False) -> ReadUnits:
    """Random pages of each row, the newest first, and among the others some that do not count."""
    rng = np.random.default_rng(3)
    rows = case.kv_heads * (case.group if per_head else 1)
    units = np.zeros((len(case.entries), rows, count), np.int32)
    chosen = np.zeros(units.shape, bool)
    for slot, held in enumerate(case.entries):
        pages = -(-held // case.page)
        for row in range(rows if held else 0):
            order = [pages - 1, *rng.permutation(pages - 1)][:count]
            units[slot, row, : len(order)] = order
            chosen[slot, row, : len(order)] = np.r_[True, rng.random(len(order) - 1) < 0.9]
    return ReadUnits(jnp.asarray(units), jnp.asarray(chosen))


def expected(case: Case, selection: ReadUnits) -> np.ndarray:
    out = np.zeros(case.q.shape)
    units, chosen = np.asarray(selection.units), np.asarray(selection.chosen)
    share = case.kv_heads * case.group // units.shape[1]  # query heads of a row
    for slot, held in enumerate(case.entries):
        for head in range(case.kv_heads * case.group if held else 0):
            row = units[slot, head // share][chosen[slot, head // share]]
            read = oracle.entries_of(list(row), held, case.page)
            at = (slot, head // case.group)
            query = case.q[slot].reshape(-1, case.dim)[head]
            attended = oracle.attend(query[None], case.keys[at], case.values[at], read, case.scale)
            out[slot].reshape(-1, case.dim)[head] = attended[0]
    return out


class SelectedAttention:
    implementation: str

    def unserved(self, case: Case) -> str | None:
        """What an implementation says to a case that it does not serve."""
        return None

    def check(self, case: Case, selection: ReadUnits) -> None:
        arrays = case.array(case.q), case.array(case.keys), case.array(case.values), case.held, selection
        reason = self.unserved(case)
        if reason is not None:
            with pytest.raises(NotImplementedError, match=reason):
                run(self.implementation, selected_attention, *arrays, page_size=case.page, scale=case.scale)
            return
        got = run(self.implementation, selected_attention, *arrays, page_size=case.page, scale=case.scale)
        rounding = 2e-5 if case.dtype == "float32" else 2**-7
        np.testing.assert_allclose(got, expected(case, selection), rtol=rounding, atol=rounding)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_output_is_the_oracles(self, case: Case):
        self.check(case, draw(case, 19))

    def test_each_query_head_may_have_pages_of_its_own(self):
        self.check(Case(3, 128, 8, 256, (100,), kv_heads=2), draw(Case(3, 128, 8, 256, (100,), kv_heads=2), 5, True))

    def test_a_view_of_no_whole_pages_is_refused(self):
        case = Case(4, 128, 8, 100, (20,))
        assert case.capacity % case.page
        arrays = case.array(case.q), case.array(case.keys), case.array(case.values), case.held, draw(case, 2)
        with pytest.raises((ValueError, NotImplementedError), match="capacity=100"):
            run(self.implementation, selected_attention, *arrays, page_size=case.page, scale=case.scale)


class TestReference(SelectedAttention):
    implementation = "reference"


class TestTpu(SelectedAttention):
    implementation = "tpu"

    def unserved(self, case: Case) -> str | None:
        return "head_dim=64" if case.dim == 64 else None


class TestGpu(SelectedAttention):
    implementation = "gpu"

    def unserved(self, case: Case) -> str | None:
        if case.dtype == "float32":
            return "queries of float32"
        return "page_size=4" if case.page == 4 else None
