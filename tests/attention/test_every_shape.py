"""Both stages against the oracle in every combination of groups of heads, head dims and page sizes."""

import numpy as np
import pytest

from kvjax.attention.eviction import Observation
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection, Selection
from tests.attention import rocketkv_oracle as oracle
from tests.attention.test_observation import SCALE, check_retained, prompt, run_scores_and_retain
from tests.attention.test_selection import run
from tests.attention.views import HEADS, Views, check_step

pytestmark = [
    pytest.mark.slow,  # compiles about a hundred shapes, each in a second or so
    pytest.mark.parametrize("dim", [64, 128]),
    pytest.mark.parametrize("heads", HEADS),
]
ENTRIES = (96, 0, 1, 19, 50)
METHODS: list[Selection] = [
    *(HybridTokens(12, 41, page_size, dense_threshold=13) for page_size in (1, 2, 3)),
    *(HybridPages(33, page_size, dense_threshold=20) for page_size in (1, 2, 4, 8, 16)),
    QuestSelection(48, 16),
    ExactTopK(12),
    ExactTopK(12, shared=False),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_step_reads_and_says_what_the_oracle_does(heads, dim, method):
    views = Views.draw(heads, dim, 96, ENTRIES, seed=dim)
    assert check_step(method, views, *run(method, *views.arrays)) > 0


@pytest.mark.parametrize(("kernel", "per_head"), [(63, False), (7, False), (7, True)])
def test_a_prompt_leaves_what_the_oracle_leaves(heads, dim, kernel, per_head):
    length, window, max_retained = 300, 32, 100
    queries, k = prompt(heads, length, 320, window, dim)
    eviction = Observation(window, kernel=kernel, per_head=per_head)
    computed, retained = map(np.asarray, run_scores_and_retain(eviction, queries, k, np.int32(length), max_retained))
    scores = oracle.stage1_scores(queries, k, length, window, SCALE, kernel, per_head)
    np.testing.assert_allclose(computed[:, : length - window], scores, rtol=2e-5)
    check_retained(retained, scores, length, window, max_retained)
