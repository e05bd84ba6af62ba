"""The scheduler's policy, simulated without a device: requests are records, and time is a number."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.engine.scheduling.scheduler import Scheduler
from kvjax.engine.scheduling.work import Admit, DecodeSteps, PrefillChunk, Resume, Wait

STEPS = 4


@dataclasses.dataclass(eq=False)
class Request:
    """One with a prompt of so many units and so many tokens to generate."""

    name: str = ""
    units: int = 1
    tokens: int = 1
    ready_at: float = 0.0
    conversation: str | None = None
    refreshes: int = 0  # how often it still finds, in its turn, that what it needs is being computed
    stepwise: bool = False  # it follows a grammar

    def refresh(self) -> bool:
        self.refreshes -= 1
        return self.refreshes >= 0


class SuspendedNames:
    """Conversations by the slots in which they are suspended."""

    def __init__(self, **slots: int) -> None:
        self.names = {slot: name for name, slot in slots.items()}

    @property
    def slots(self) -> list[int]:
        return list(self.names)

    def find(self, request: Request) -> int | None:
        return next((slot for slot, name in self.names.items() if name == request.conversation), None)


class Device:
    """Executes work as the loop does, an engine whose units and steps take a second each."""

    def __init__(self, slots: int, suspended: SuspendedNames | None = None) -> None:
        self.suspended = suspended or SuspendedNames()
        self.scheduler = Scheduler[Request](slots, STEPS, self.suspended)
        self.now = 0.0
        self.log: list[str] = []
        self.finished: list[Request] = []
        self._units: dict[int, int] = {}
        self._tokens: dict[int, int] = {}

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
        slot = self.scheduler.remove(request)
        if slot is not None:
            self._tokens.pop(slot, None)
            self._units.pop(slot, None)

    def step(self):
        work = self.scheduler.next(self.now)
        self.scheduler.check_integrity()
        match work:
            case Resume(slot, request):
                assert self.suspended.names.pop(slot) == request.conversation
                self._tokens[slot] = request.tokens
                self.log.append(f"resume {request.name} in {slot}")
            case Admit(slot, request):
                self.suspended.names.pop(slot, None)
                self._units[slot] = request.units
                self.log.append(f"admit {request.name} to {slot}")
            case PrefillChunk(slot, request):
                self.now += 1
                self._units[slot] -= 1
                self.log.append(f"unit of {request.name}")
                if not self._units[slot]:
                    self._tokens[slot] = request.tokens
                    self.scheduler.prefilled()
            case DecodeSteps(slots, count):
                self.now += count
                self.log.append(f"{count} for {''.join(request.name for request in slots.values())}")
                for slot, request in slots.items():
                    self._tokens[slot] -= count
                    if self._tokens[slot] <= 0:
                        self.cancel(request)
                        self.finished.append(request)
            case Wait(seconds):
                self.log.append(f"wait {seconds}")
                self.now += seconds or 0.0
        return work

    def run(self) -> list[str]:
        """Until nothing is left to do; returns the log."""
        while self.step() != Wait(None):
            assert len(self.log) < 10_000
        assert self.scheduler.idle
        return self.log[:-1]


def admitted(log: list[str]) -> list[str]:
    return [line.split()[1] for line in log if line.startswith("admit")]


def test_first_come_first_served_one_prompt_at_a_time():
    device = Device(2)
    assert device.scheduler.idle
    device.submit(Request("a", 2, 9), Request("b", 1, 5), Request("c", 1, 1))
    assert device.run() == [
        "admit a to 0", "unit of a", "unit of a",
        "admit b to 1", "1 for a", "unit of b",
        "4 for ab", "4 for ab",
        "admit c to 0", "unit of c", "4 for c",
    ]  # fmt: skip


def test_one_decode_step_runs_between_any_two_units_of_a_prompt():
    device = Device(2)
    device.submit(Request("a", 1, 100))
    device.step(), device.step(), device.step()
    device.submit(Request("b", 5, 1))
    while "unit of b" not in device.log or not device.log[-1].startswith("4"):
        device.step()
    begun = device.log.index("admit b to 1")
    assert device.log[begun + 1 : begun + 11] == ["1 for a", "unit of b"] * 5


def test_running_requests_wait_for_one_unit_at_most_while_long_prompts_arrive():
    """However many prompts come, and however long they are."""
    device = Device(4)
    running = Request("a", 1, 200)
    device.submit(running)
    device.step(), device.step()
    device.submit(*(Request("p", 20, 3) for _ in range(12)))
    since = 0
    while running not in device.finished:
        work = device.step()
        if isinstance(work, PrefillChunk | DecodeSteps):
            since = since + 1 if isinstance(work, PrefillChunk) else 0
        assert since <= 1
    assert device.now <= 1 + 2 * 200  # its own unit, and a unit of another prompt before each of its steps
    device.run()


def test_prompts_are_read_to_their_end_while_others_decode():
    device = Device(2)
    device.submit(Request("a", 1, 1000), Request("b", 6, 1))
    while "unit of b" not in device.log:
        device.step()
    before = device.now
    while device.log.count("unit of b") < 6:
        device.step()
    assert device.now - before == 10  # five units, and a step before each of them


def test_a_request_whose_stored_kv_is_on_its_way_is_overtaken_but_not_for_ever():
    device = Device(1)
    device.submit(Request("late", ready_at=7.0), *(Request(name) for name in "abc"))
    assert admitted(device.run()) == ["a", "b", "late", "c"]  # each takes five seconds


def test_waiting_lasts_until_the_first_request_is_ready():
    device = Device(2)
    device.submit(Request("a", ready_at=9.0), Request("b", ready_at=4.0))
    assert device.scheduler.next(1.0) == Wait(3.0)
    assert device.scheduler.next(4.0) == Admit(0, device.scheduler.slots[0])
    assert Device(1).scheduler.next(0.0) == Wait(None)


def test_stored_kv_that_has_come_ends_the_waiting():
    device = Device(1)
    request = Request("a", ready_at=60.0)
    device.submit(request)
    assert device.scheduler.next(0.0) == Wait(60.0)
    request.ready_at = 0.0
    assert device.scheduler.next(0.0) == Admit(0, request)


def test_a_request_looks_again_in_its_turn_and_waits_for_what_another_computes():
    device = Device(2)
    device.submit(Request("a"), Request("equal", refreshes=2), Request("b"))
    assert admitted(device.run()) == ["a", "b", "equal"]


def test_suspended_slots_are_taken_last_and_in_their_order():
    device = Device(3, SuspendedNames(x=2, y=0))
    device.submit(*(Request(name, tokens=100) for name in "abc"))
    while device.scheduler.waiting:
        device.step()
    assert [line for line in device.log if line.startswith("admit")] == ["admit a to 1", "admit b to 2", "admit c to 0"]
    assert not device.suspended.slots


def test_a_suspended_conversation_is_resumed_before_anything_else_and_never_read_anew():
    device = Device(2, SuspendedNames(x=1))
    again = Request("x again", tokens=5, conversation="x", ready_at=math.inf)
    device.submit(Request("a", 3, 1), Request("b", 1, 1), again)
    assert device.scheduler.next(0.0) == Resume(1, again)
    device.suspended.names.clear()
    assert device.scheduler.decoding == {1: again}
    assert isinstance(device.scheduler.next(0.0), Admit)
    assert device.scheduler.next(0.0) == DecodeSteps({1: again}, 1)


def test_a_request_that_comes_while_a_prompt_is_read_resumes_at_once():
    device = Device(2, SuspendedNames(x=1))
    device.submit(Request("a", 4, 1))
    device.step(), device.step()
    device.submit(Request("x again", tokens=1, conversation="x"))
    log = device.run()
    assert log[:4] == ["admit a to 0", "unit of a", "resume x again in 1", "1 for x again"]


def test_of_two_requests_for_one_conversation_the_first_gets_it():
    device = Device(1, SuspendedNames(x=0))
    device.submit(*(Request(name, tokens=1, conversation="x") for name in "ab"))
    assert device.run() == ["resume a in 0", "4 for a", "admit b to 0", "unit of b", "4 for b"]


def test_removing():
    device = Device(1)
    one, other = Request("a", 2), Request("b")
    device.submit(one, other)
    scheduler = device.scheduler
    assert scheduler.remove(other) is None, "it was waiting"
    assert scheduler.remove(other) is None, "it is gone"
    device.step(), device.step()
    assert scheduler.prefilling == 0
    assert scheduler.remove(one) == 0
    assert scheduler.prefilling is None
    assert scheduler.idle
    assert scheduler.next(0.0) == Wait(None)
    scheduler.check_integrity()


def test_a_cancelled_prompt_makes_way_for_the_next_one_at_once():
    device = Device(2)
    one, other = Request("a", 50), Request("b")
    device.submit(one, other)
    device.step(), device.step()
    device.cancel(one)
    assert device.run()[2:] == ["admit b to 0", "unit of b", "4 for b"]


def test_integrity_is_checked():
    scheduler = Scheduler[Request](2)
    request = Request()
    scheduler.submit(request)
    scheduler.next(0.0)
    scheduler.waiting.append(request)
    with pytest.raises(AssertionError, match="two places"):
        scheduler.check_integrity()
    scheduler.waiting.clear()
    scheduler.slots[0] = None
    with pytest.raises(AssertionError, match="without a slot"):
        scheduler.check_integrity()


EVENTS = st.tuples(
    st.sampled_from(["submit", "submit", "work", "work", "work", "cancel"]),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.0, 5.0, 30.0]),
    st.sampled_from([None, None, "x", "y"]),
)


@hypothesis.given(st.integers(1, 3), st.booleans(), st.lists(EVENTS, max_size=80))
def test_no_request_is_lost_and_none_starves_whatever_happens(slots, suspended, events):
    device = Device(slots, SuspendedNames(x=0) if suspended else None)
    scheduler, there, arrived = device.scheduler, [], {}
    since_decoded = 0
    for event, units, tokens, patience, conversation in events:
        if event == "submit":
            request = Request(
                str(len(arrived)), units, tokens, device.now + patience if patience else 0.0, conversation
            )
            device.submit(request)
            there.append(request)
            arrived[request] = len(arrived)
        elif event == "cancel" and there:
            device.cancel(there.pop(tokens % len(there)))
        elif event == "work":
            decoding = {**scheduler.decoding}
            work = device.step()
            there = [request for request in there if request not in device.finished]
            if isinstance(work, Admit):
                overtaken = [request for request in scheduler.waiting if arrived[request] < arrived[work.request]]
                assert all(request.ready_at > device.now for request in overtaken), "first come, first served"
            if isinstance(work, Wait):
                assert not scheduler.running
            since_decoded = since_decoded + isinstance(work, PrefillChunk) if decoding else 0
            since_decoded = 0 if isinstance(work, DecodeSteps) else since_decoded
            assert since_decoded <= 1, "a running request waits for one unit at most"
        scheduler.check_integrity()
        assert sorted(map(id, scheduler.requests)) == sorted(map(id, there))
        assert len(scheduler.running) <= slots
        assert scheduler.idle == (not there)
        assert len(scheduler.running) - len(scheduler.decoding) == (scheduler.prefilling is not None)
    device.run()
    assert {*there} <= {*device.finished}, "every request that is not cancelled comes to its end"


def test_a_request_that_follows_a_grammar_is_decoded_step_by_step_with_all_others():
    scheduler = Scheduler(2, STEPS)
    for name, stepwise in (("a", False), ("b", True)):
        scheduler.submit(Request(name, stepwise=stepwise))
        assert isinstance(scheduler.next(0.0), Admit)
        scheduler.prefilled()
    assert scheduler.stepwise
    assert scheduler.next(0.0) == DecodeSteps(scheduler.decoding, 1)
    scheduler.remove(scheduler.slots[1])
    assert not scheduler.stepwise
    assert scheduler.next(0.0) == DecodeSteps(scheduler.decoding, STEPS)
