"""Counting entries on the host, for slots whose requests have plans of their own."""

import numpy as np
import pytest

from kvjax.attention.eviction import Observation
from kvjax.attention.methods import LayerCacheConfig
from kvjax.engine.device.occupancy import Occupancy

STAGE1 = Observation(4)
OWN = (
    LayerCacheConfig(9),
    LayerCacheConfig(20, STAGE1, max_retained=12),
    LayerCacheConfig(16, STAGE1, max_retained=12),
)  # the first chooses nothing
SMALL = (LayerCacheConfig(9), LayerCacheConfig(10, STAGE1, max_retained=6), LayerCacheConfig(9, STAGE1, max_retained=4))
ALL = np.ones(2, np.bool_)


@pytest.fixture
def fill():
    fill = Occupancy(OWN, slots=2)
    fill.written(0, 100, OWN)
    fill.written(1, 100, SMALL)
    yield fill
    fill.check_integrity()


def test_each_slot_is_full_when_its_own_plans_say_so(fill):
    assert list(fill.full(ALL)) == []
    assert fill.advance(ALL, 10) == 4, "the small one has room for four more in layer 1, five in layer 2"
    assert sorted(fill.full(ALL)) == [(1, 1), (2, 0)]
    for layer, slot in fill.full(ALL):
        fill.reselected(layer, slot)
    assert fill.advance(ALL, 10) == 1
    assert list(fill.full(ALL)) == [(2, 1)]


def test_who_is_not_alive_holds_nobody_up(fill):
    alone = np.array([True, False])
    assert fill.advance(alone, 10) == 4
    assert fill.length.tolist() == [104, 100]
    assert list(fill.full(alone)) == [(2, 0)]


def test_a_slot_forgets_the_plans_of_the_request_before(fill):
    fill.written(1, 3, OWN)
    assert fill.advance(np.array([False, True]), 20) == 13
    fill.written(1, 100, SMALL)
    assert fill.advance(np.array([False, True]), 20) == 4


def test_a_view_that_holds_too_much_is_found():
    fill = Occupancy(OWN, slots=2)
    fill.written(1, 100, SMALL)
    fill.check_integrity()
    fill._used[0, 1] = 11
    with pytest.raises(AssertionError):
        fill.check_integrity()
