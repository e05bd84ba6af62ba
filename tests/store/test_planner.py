"""Load or compute: the choice follows the rates, and learns when they change."""

import pytest

from kvjax.store.planner import PATIENCE, Planner


def planner(compute, **load):
    made = Planner()
    for index, seconds in enumerate(compute):
        made.computed(index, seconds)
    for tier, seconds in load.items():
        made.loaded(tier, seconds)
    return made


def test_nothing_known_loads_everything():
    assert Planner().choose(["disk"] * 3) == 3
    assert Planner().choose([]) == 0


@pytest.mark.parametrize(("load", "chunks"), [(0.5, 8), (0.99, 8), (1.01, 0), (10.0, 0)])
def test_the_cheaper_one_is_chosen(load, chunks):
    assert planner([1.0] * 8, disk=load).choose(["disk"] * 8) == chunks


def test_late_chunks_cost_more_to_compute_so_a_prefix_pays_once_it_is_long():
    made = planner([1 + 0.5 * index for index in range(16)], disk=3.0)
    assert made.compute_seconds(8) == pytest.approx(5.0)
    assert made.choose(["disk"] * 4) == 0
    assert made.choose(["disk"] * 16) == 16
    # chunks 8 to 11 alone are worth it: what lies before them is on the device already
    assert made.choose(["disk"] * 4, first=8) == 4


def test_a_slow_tail_is_left():
    made = planner([1.0] * 8, disk=0.1, remote=5.0)
    assert made.choose(["host", "disk", "disk", "remote"]) == 3
    assert made.choose(["remote", "host", "host", "host", "host", "host", "host"]) == 7


def test_a_tier_that_nobody_has_measured_is_tried():
    assert planner([1.0] * 8).choose(["disk"] * 8) == 8


def test_a_tier_that_lost_is_tried_again_once_in_a_while():
    made = planner([1.0] * 8, disk=100.0)
    chosen = [made.choose(["disk"] * 8) for _ in range(3 * PATIENCE)]
    assert chosen.count(1) == 3
    assert chosen.count(0) == 3 * PATIENCE - 3
    for _ in range(40):
        made.loaded("disk", 0.1)
    assert made.choose(["disk"] * 8) == 8


def test_rates_follow_the_machine():
    made = planner([1.0] * 8, disk=0.5)
    for _ in range(200):
        made.computed(3, 0.1)
    assert made.compute_seconds(3) == pytest.approx(0.1, rel=0.1)
    assert made.choose(["disk"] * 8) == 0


def test_no_units_no_measurement():
    made = Planner()
    made.loaded("disk", 1.0, units=0.0)
    assert made.load_seconds("disk") is None
    assert made.compute_seconds(0) is None
