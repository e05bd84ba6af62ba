"""Load or compute: the choice follows the rates, learns when they change, and forgives a hiccup."""

import random

import pytest

from kvjax.store.planner import HALVES, PROBE, Planner


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def planner(compute, clock=None, **load):
    made = Planner(clock or Clock())
    for index, seconds in enumerate(compute):
        made.computed(index, seconds)
    for tier, seconds in load.items():
        made.loaded(tier, seconds)
    return made


def test_nothing_known_loads_everything():
    assert Planner().choose(["disk"] * 3) == 3
    assert Planner().choose([]) == 0


@pytest.mark.parametrize(("load", "blocks"), [(0.5, 8), (0.99, 8), (1.01, 0), (10.0, 0)])
def test_the_cheaper_one_is_chosen(load, blocks):
    assert planner([1.0] * 8, disk=load).choose(["disk"] * 8) == blocks


def test_late_blocks_cost_more_to_compute_so_a_prefix_pays_once_it_is_long():
    made = planner([1 + 0.5 * index for index in range(16)], disk=3.0)
    assert made.compute_seconds(8) == pytest.approx(5.0)
    assert made.compute_seconds(8, blocks=3) == pytest.approx(5.0 + 5.5 + 6.0)
    assert made.choose(["disk"] * 4) == 0
    assert made.choose(["disk"] * 16) == 16
    # blocks 8 to 11 alone are worth it: what lies before them is on the device already
    assert made.choose(["disk"] * 4, first=8) == 4


def test_a_slow_tail_is_left():
    made = planner([1.0] * 8, disk=0.1, remote=5.0)
    assert made.choose(["host", "disk", "disk", "remote"]) == 3
    assert made.choose(["remote", "host", "host", "host", "host", "host", "host"]) == 7


def test_a_tier_that_was_never_measured_is_tried():
    assert planner([1.0] * 8).choose(["disk"] * 8) == 8


def test_a_tier_that_lost_is_probed_by_seconds_and_believed_at_once():
    clock = Clock()
    made = planner([1.0] * 8, clock, disk=100.0)
    probes = 0
    for _ in range(100):  # choices: their number says nothing
        assert made.choose(["disk"] * 8) == 0
        clock.now += 0.1
        probes += made.probe("disk")
    assert probes == pytest.approx(10 / PROBE, abs=1)
    made.loaded("disk", 0.1)
    assert made.choose(["disk"] * 8) == 8


def test_one_hiccup_changes_nothing():
    made = planner([1.0] * 8, disk=0.05)
    for _ in range(5):
        made.loaded("disk", 0.05)
    for _ in range(2):
        made.loaded("disk", 24.0)
        assert made.choose(["disk"] * 8) == 8
    assert made.load_seconds("disk") == pytest.approx(0.05)


def test_a_tier_that_stays_slow_is_left_after_three():
    made = planner([1.0] * 8, disk=0.05)
    for _ in range(5):
        made.loaded("disk", 0.05)
    for _ in range(3):
        made.loaded("disk", 24.0)
    assert made.choose(["disk"] * 8) == 0


def test_an_estimate_that_nothing_renews_fades_to_the_best_that_was_seen():
    clock = Clock()
    made = planner([1.0] * 8, clock, disk=0.2)
    for _ in range(5):
        made.loaded("disk", 1.6)
    assert made.load_seconds("disk") == pytest.approx(1.6)
    clock.now += HALVES
    assert made.load_seconds("disk") == pytest.approx(0.8)
    clock.now += 100 * HALVES
    assert made.load_seconds("disk") == pytest.approx(0.2)


def test_a_pause_of_the_machine_is_not_the_rate_of_computing():
    made = planner([1.0] * 20)
    made.computed(5, 100.0)
    assert made.compute_seconds(5) < 1.5


def test_rates_follow_the_machine():
    made = planner([1.0] * 8, disk=0.5)
    for _ in range(200):
        made.computed(3, 0.1)
    assert made.compute_seconds(3) == pytest.approx(0.1, rel=0.1)
    assert made.choose(["disk"] * 8) == 0


def test_no_blocks_no_measurement():
    made = Planner()
    made.loaded("disk", 1.0, blocks=0.0)
    assert made.load_seconds("disk") is None
    assert made.compute_seconds(0) is None
    assert made.probe("disk")
    assert made.load_seconds("disk") is None


@pytest.mark.parametrize(("load", "compute"), [(0.01, 0.1), (0.05, 0.06), (0.2, 0.1), (1.0, 0.1), (5.0, 0.1)])
def test_no_minute_with_hiccups_is_worse_than_the_better_of_both_by_more_than_five_percent(load, compute):
    """Requests of eight blocks behind each other; now and then the tier stops for 1.2 s, as a paused Redis does.

    A request that waits gives a tier up once it is later than computing would be, as `PrefixLoad.patience` has it.
    """
    clock, blocks = Clock(), 8
    rng = random.Random(5)
    made = planner([compute] * 8, clock)
    end, spent, ideal = clock.now + 60.0, 0.0, 0.0
    stops = sorted(clock.now + rng.uniform(2, 58) for _ in range(3))
    probe_ready: float | None = None
    while clock.now < end:
        if probe_ready is not None and clock.now >= probe_ready:
            made.loaded("disk", load)
            probe_ready = None
        chosen = made.choose(["disk"] * blocks)
        if made.load_seconds("disk") is None:
            chosen = 1  # of an unknown tier one, and then the rest is chosen again
        if not chosen and made.probe("disk"):
            probe_ready = clock.now + load
        took = 0.0
        done = 0
        while done < chosen:
            stopped = next((1.2 for stop in stops if stop <= clock.now + took < stop + 1.2), 0.0)
            needed, patience = load + stopped, (blocks - done) * compute
            took += min(needed, max(patience, 0.05))
            made.loaded("disk", needed)
            if needed > max(patience, 0.05):
                break
            done += 1
            chosen = done + made.choose(["disk"] * (blocks - done), done)
        took += (blocks - done) * compute
        clock.now += took
        spent += took
        ideal += blocks * min(load, compute)
    stopped_cost = 3 * 1.2 + 3 * blocks * compute  # whoever meets a stop pays it, or computes after having waited
    assert spent <= 1.05 * ideal + stopped_cost + max(load, compute)
