"""Anything may happen in any order: requests come, are read, left, disconnected, refused, and none disturbs another.

A few requests have known answers. Whoever stays to the end must get his to the bit; whoever leaves, a beginning.
"""

import dataclasses
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvjax.engine import Completion, Delta, Engine, Finish, QueueFullError, SamplingParams
from tests.engine import tiny
from tests.engine.client import Caller, Client, settle
from tests.engine.conftest import SLOTS

PLACES = SLOTS + 60
BASE = SamplingParams(ignore_eos=True, logprobs=1)
REQUESTS = [
    (tiny.prompt(4), dataclasses.replace(BASE, temperature=0.0, max_tokens=6)),
    (tiny.prompt(70), dataclasses.replace(BASE, seed=1, max_tokens=25, top_p=0.9)),
    (tiny.prompt(300), dataclasses.replace(BASE, seed=2, max_tokens=3, prompt_logprobs=1)),
    (tiny.prompt(600), dataclasses.replace(BASE, seed=3, max_tokens=10)),
    (tiny.prompt(90), dataclasses.replace(BASE, max_tokens=0, prompt_logprobs=0)),
    (tiny.prompt(256), dataclasses.replace(BASE, seed=4, max_tokens=1)),
    (tiny.prompt(20), dataclasses.replace(BASE, seed=5, max_tokens=60)),
    (tiny.prompt(3), dataclasses.replace(BASE, seed=6, max_tokens=40, stop=("a", "e"), ignore_eos=False)),
]
which = st.integers(0, len(REQUESTS) - 1)
MOST_STEPS, RUNS, LEAST_EVENTS = 50, 12, 500


def check(deltas: list[Delta], want: Completion) -> None:
    """What a caller has heard is the beginning of his answer, and all of it if that has ended by itself."""
    if not deltas:
        return
    heard = Completion.join(want.prompt_tokens, [*deltas[:-1], dataclasses.replace(deltas[-1], finish=want.finish)])
    if deltas[-1].finish in (Finish.STOP, Finish.LENGTH):
        assert deltas[-1].finish is want.finish
        assert heard == want
    else:
        assert heard.tokens == want.tokens[: len(heard.tokens)]
        assert heard.logprobs == want.logprobs[: len(heard.logprobs)]
        assert want.text.startswith(heard.text)


class Machine(RuleBasedStateMachine):
    engine: Engine
    client: Client
    answers: list[Completion]
    events = 0

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[tuple[int, Caller, bool]] = []  # the request, who asks it, and whether he stays

    @rule(index=which)
    def submit(self, index):
        self.callers.append((index, self.client.submit(self.engine, *REQUESTS[index]), True))

    @rule(index=which, after=st.integers(1, 4))
    def submit_and_leave(self, index, after):
        self.callers.append((index, self.client.submit(self.engine, *REQUESTS[index], leave_after=after), False))

    @rule(indices=st.lists(which, min_size=2, max_size=4), use=st.integers(1, 4))
    def submit_several_with_one_reservation(self, indices, use):
        """Some of its places may stay unused, some requests without a place."""
        with self.engine.reserve(use) as reservation:
            callers = [self.client.submit(self.engine, *REQUESTS[i], reservation=reservation) for i in indices]
            for caller in callers:
                caller.wait()
        refused = [caller for caller in callers if isinstance(caller.future.exception(), QueueFullError)]
        assert len(refused) == max(0, len(indices) - use)
        for index, caller in zip(indices, callers, strict=True):
            if caller not in refused:
                self.callers.append((index, caller, True))

    @rule(index=which)
    def generate(self, index):
        prompt, params = REQUESTS[index]
        assert self.engine.generate([prompt], params, progress=False) == [self.answers[index]]

    @rule(number=st.integers(0, 1000))
    def disconnect(self, number):
        if self.callers:
            place = number % len(self.callers)
            index, caller, _ = self.callers[place]
            caller.disconnect()
            self.callers[place] = (index, caller, False)

    @rule(number=st.integers(0, 1000))
    def wait_for_one(self, number):
        if self.callers:
            self.callers[number % len(self.callers)][1].wait()

    @rule(milliseconds=st.sampled_from([0, 1, 5, 20]))
    def let_time_pass(self, milliseconds):
        time.sleep(milliseconds / 1000)

    @rule()
    def ask_for_too_much(self):
        with pytest.raises(QueueFullError):
            self.engine.reserve(PLACES + 1)
        with pytest.raises(ValueError, match="context"):
            self.client.submit(self.engine, tiny.prompt(tiny.CONTEXT), BASE).result()

    @invariant()
    def slots_and_queue_are_within_bounds(self):
        type(self).events += 1
        stats = self.engine.stats()
        assert len(stats.slots) == SLOTS
        assert stats.running + stats.waiting <= stats.submitted - stats.finished - stats.cancelled
        assert self.engine.failure is None
        # more than the places would be refused; a machine never comes near
        hypothesis.assume(len([1 for _, caller, _ in self.callers if not caller.future.done()]) < PLACES - 10)

    def teardown(self):
        for _, caller, _ in self.callers:
            caller.wait()
        settle(self.engine)
        for index, caller, stays in self.callers:
            check(caller.deltas, self.answers[index])
            if stays:
                assert caller.result() == self.answers[index]


def test_any_order_of_events(engine, client):
    Machine.engine, Machine.client = engine, client
    Machine.answers = [engine.generate([prompt], params, progress=False)[0] for prompt, params in REQUESTS]
    assert Machine.answers[-1].finish is Finish.STOP
    scale = hypothesis.settings.default.max_examples / 50
    settings = hypothesis.settings(max_examples=round(RUNS * scale), stateful_step_count=MOST_STEPS)
    before = engine.stats()
    run_state_machine_as_test(Machine, settings=settings)
    after = engine.stats()
    assert Machine.events > LEAST_EVENTS
    assert after.cancelled > before.cancelled
    assert after.finished - before.finished > 100
