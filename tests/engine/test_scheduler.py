import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.engine.scheduler import Scheduler


def test_first_come_first_served_one_prompt_at_a_time():
    scheduler = Scheduler[str](2)
    assert scheduler.idle
    assert scheduler.admit() is None
    for name in "abc":
        scheduler.submit(name)
    assert scheduler.admit() == (0, "a")
    assert scheduler.admit() is None, "a prompt is being read"
    assert scheduler.decoding == {}
    scheduler.prefilled()
    assert scheduler.admit() == (1, "b")
    assert scheduler.decoding == {0: "a"}
    scheduler.prefilled()
    assert scheduler.admit() is None, "no slot is free"
    assert scheduler.decoding == {0: "a", 1: "b"}
    assert scheduler.remove("a") == 0
    assert scheduler.admit() == (0, "c")
    assert scheduler.running == ["c", "b"]
    assert not scheduler.idle


def test_removing():
    scheduler = Scheduler[str](1)
    scheduler.submit("a")
    scheduler.submit("b")
    assert scheduler.remove("b") is None, "it was waiting"
    assert scheduler.remove("b") is None, "it is gone"
    assert scheduler.admit() == (0, "a")
    assert scheduler.remove("a") == 0
    assert scheduler.prefilling is None
    assert scheduler.idle
    scheduler.check_integrity()


def test_integrity_is_checked():
    scheduler = Scheduler[str](2)
    scheduler.submit("a")
    scheduler.admit()
    scheduler.waiting.append("a")
    with pytest.raises(AssertionError, match="two places"):
        scheduler.check_integrity()
    scheduler.waiting.clear()
    scheduler.slots[0] = None
    with pytest.raises(AssertionError, match="without a slot"):
        scheduler.check_integrity()


@hypothesis.given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from("samfd"), st.integers(0, 9)), max_size=60))
def test_nobody_is_lost_whatever_happens(slots, events):
    scheduler, there, order = Scheduler[int](slots), [], []
    for number, (event, which) in enumerate(events):
        if event == "s":
            scheduler.submit(number)
            there.append(number)
        elif event == "a" and (admitted := scheduler.admit()):
            order.append(admitted[1])
        elif event == "f" and scheduler.prefilling is not None:
            scheduler.prefilled()
        elif event == "d" and there:
            gone = there.pop(which % len(there))
            held = gone in scheduler.running
            assert (scheduler.remove(gone) is not None) == held
        scheduler.check_integrity()
        assert sorted([*scheduler.waiting, *scheduler.running]) == there
        assert len(scheduler.running) <= slots
        assert scheduler.idle == (not there)
        decoding = {*scheduler.decoding.values()}
        assert len(scheduler.running) - len(decoding) == (scheduler.prefilling is not None)
    assert order == sorted(order)


def test_parked_slots_are_taken_last_and_in_their_order():
    scheduler = Scheduler[str](3)
    for request in "abcd":
        scheduler.submit(request)
    taken = []
    for _ in range(2):
        slot, _ = scheduler.admit(suspended=[slot for slot in (2, 0) if slot not in taken])
        scheduler.prefilled()
        taken.append(slot)
    assert taken == [1, 2]
    scheduler.resume("d", 0)
    assert scheduler.slots == ["d", "a", "b"]
    assert list(scheduler.waiting) == ["c"]
    assert scheduler.decoding == {0: "d", 1: "a", 2: "b"}
    assert scheduler.admit(suspended=[]) is None
    with pytest.raises(AssertionError, match="held"):
        scheduler.resume("c", 0)
    scheduler.check_integrity()
