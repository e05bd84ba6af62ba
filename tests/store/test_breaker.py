"""The breaker: when it lets whom ask."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.store.breaker import Breaker, Closed, Opened


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ask(breaker: Breaker, healthy: bool) -> bool:
    """Whether it let us."""
    ticket = breaker.admit()
    if ticket is not None:
        breaker.report(ticket, healthy)
    return ticket is not None


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock) -> Breaker:
    return Breaker(failures=3, pause=5.0, clock=clock)


def test_it_opens_after_so_many_in_a_row(breaker):
    for healthy in (False, False, True, False, False):
        assert ask(breaker, healthy)
        assert breaker.state == "closed"
    ask(breaker, False)
    assert breaker.state == "open"
    assert not ask(breaker, True)


def test_one_probe_after_the_pause(breaker, clock):
    for _ in range(3):
        ask(breaker, False)
    clock.now += 4.9
    assert breaker.admit() is None
    clock.now += 0.2
    assert breaker.state == "half-open"
    probe = breaker.admit()
    assert probe is not None
    assert breaker.state == "half-open"
    assert breaker.admit() is None, "one probe at a time"
    breaker.report(probe, False)
    assert breaker.state == "open"
    clock.now += 5
    assert ask(breaker, True)
    assert breaker.state == "closed"
    assert ask(breaker, False)
    assert breaker.state == "closed", "it counts from nothing again"


def test_a_probe_that_asked_nobody_leaves_its_place(breaker, clock):
    for _ in range(3):
        ask(breaker, False)
    clock.now += 5
    breaker.report(breaker.admit(), None)
    assert breaker.state == "half-open"
    assert ask(breaker, True)


def test_calls_from_before_have_no_say(breaker, clock):
    early = [breaker.admit() for _ in range(3)]
    for _ in range(3):
        ask(breaker, False)
    breaker.report(early[0], True)
    assert breaker.state == "open", "an old success does not close it"
    clock.now += 5
    probe = breaker.admit()
    breaker.report(early[1], False)
    assert breaker.state == "half-open", "an old failure does not end the probe"
    breaker.report(probe, True)
    breaker.report(early[2], False)
    assert breaker.state == "closed"


@given(st.lists(st.sampled_from(["ask", "ok", "fail", "nobody", "wait"]), max_size=60))
def test_any_history(events):
    clock = Clock()
    breaker = Breaker(failures=2, pause=1.0, clock=clock)
    out: list[int] = []
    for event in events:
        before = breaker.state
        if event == "wait":
            clock.now += 0.6
        elif event == "ask":
            ticket = breaker.admit()
            assert (ticket is not None) or before != "closed"
            assert ticket is None or before != "open"
            out += [] if ticket is None else [ticket]
        elif out:
            breaker.report(out.pop(0), {"ok": True, "fail": False, "nobody": None}[event])
    for ticket in out:
        breaker.report(ticket, None)
    clock.now += 1.0  # whatever happened, it heals
    ask(breaker, True)
    assert breaker.state == "closed"


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"pause": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match="breaker needs"):
        Breaker(**wrong)


def test_a_report_says_whether_it_opened_or_closed_the_breaker(breaker, clock):
    assert breaker.report(breaker.admit(), True) is None
    assert [breaker.report(breaker.admit(), False) for _ in range(3)] == [None, None, Opened(3)]
    assert [breaker.admit() for _ in range(4)] == [None] * 4
    for _ in range(2):  # a probe that fails is no news
        clock.now += 5
        assert breaker.report(breaker.admit(), False) is None
        assert breaker.admit() is None
    clock.now += 5
    assert breaker.report(breaker.admit(), None) is None
    assert breaker.report(breaker.admit(), True) == Closed(15.0, 6)
    assert breaker.report(breaker.admit(), True) is None
    assert [breaker.report(breaker.admit(), False) for _ in range(3)] == [None, None, Opened(3)]
    clock.now += 5
    assert breaker.report(breaker.admit(), True) == Closed(5.0, 0), "it counts from nothing again"
