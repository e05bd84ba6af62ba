"""Start, drain, close and death: every caller hears the end, and nothing hangs."""

import asyncio
import concurrent.futures
import dataclasses
import gc
import shutil
import threading
import time

import jax
import pytest

from kvjax.engine import (
    Engine,
    EngineConfig,
    EngineDeadError,
    Finish,
    QueueFullError,
    RequestFailedError,
    SamplingParams,
)
from kvjax.engine.text.tokenizer import Tokenizer
from tests.engine import tiny
from tests.engine.client import PATIENCE, settle
from tests.engine.conftest import CONFIG

LONG = SamplingParams(max_tokens=600, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture
def own(folder, _engine):
    """An engine for one test, laid out as the shared one: what that one has compiled serves it too."""
    engine = Engine.from_pretrained(folder, dataclasses.replace(CONFIG, max_num_queued_reqs=4))
    yield engine
    engine.close()


@pytest.fixture
def started(own):
    own.start()
    return own


@pytest.fixture
def slow(started, monkeypatch):
    """An engine whose long requests take seconds, so that they are there when something happens."""
    decode = started._runner.decode

    def wait(*arguments):
        time.sleep(0.02)
        return decode(*arguments)

    monkeypatch.setattr(started._runner, "decode", wait)
    return started


def bytes_on_device() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_phases(own, client):
    assert own.phase == "loading"
    assert own.stats().submitted == 0
    with pytest.raises(EngineDeadError, match="the engine is loading"):
        own.generate([[1]], progress=False)
    with pytest.raises(EngineDeadError, match="loading"):
        client.submit(own, [1], SHORT).result()
    own.check_integrity()
    own.start()
    assert own.phase == "ready"
    assert "fits        4 conversations of 1,000 tokens" in own.startup_report()
    assert own.generate([[1]], SHORT, progress=False)[0].finish is Finish.LENGTH
    own.drain(1.0)
    assert own.phase == "draining"
    with pytest.raises(EngineDeadError, match="the engine is draining"):
        own.generate([[1]], SHORT, progress=False)
    own.close()
    assert own.phase == "stopped"
    assert own.stats().finished == 1
    assert own.failure is None


def test_close_frees_the_device(own):
    before = bytes_on_device()
    own.start()
    own.generate([tiny.prompt(300)], SHORT, progress=False)
    assert bytes_on_device() > before + 2_000_000
    own.close()
    assert bytes_on_device() <= before


def test_drain_finishes_what_is_there(started, client):
    callers = [
        client.submit(started, tiny.prompt(9, i), SamplingParams(max_tokens=60, ignore_eos=True)) for i in range(6)
    ]
    callers[0].wait_for(1)
    started.drain(PATIENCE)
    for caller in callers:
        assert caller.result().finish is Finish.LENGTH
        assert len(caller.result().tokens) == 60
    with pytest.raises(QueueFullError, match="shutting down"):
        started.reserve()
    with pytest.raises(QueueFullError, match="shutting down"):
        client.submit(started, [1], SHORT).result()
    settle(started)


def test_drain_waits_for_those_that_hold_a_place(started, client):
    """A server reserves before it tokenises: such a request is there, though the engine has not seen it."""
    with concurrent.futures.ThreadPoolExecutor() as pool, started.reserve() as reservation:
        drained = pool.submit(started.drain, PATIENCE)
        while started.phase != "draining":
            time.sleep(0.001)
        with pytest.raises(TimeoutError):
            drained.result(0.05)
        caller = client.submit(started, [1], SHORT, reservation=reservation)
        drained.result(PATIENCE)
        assert caller.result().finish is Finish.LENGTH
    settle(started)


def test_drain_does_not_wait_for_a_place_that_is_never_used(started):
    with started.reserve():
        started.drain(0.05)


def test_drain_cancels_what_takes_too_long(slow, client):
    callers = [client.submit(slow, tiny.prompt(9, i), LONG) for i in range(6)]
    callers[0].wait_for(1)
    slow.drain(0.0)
    assert {caller.result().finish for caller in callers} == {Finish.CANCELLED}
    settle(slow)
    assert slow.stats().cancelled == 6


def test_close_with_requests_running(slow, client):
    callers = [client.submit(slow, tiny.prompt(9, i), LONG) for i in range(6)]
    callers[0].wait_for(1)
    slow.close()
    for caller in callers:
        assert caller.result().finish is Finish.ERROR
        assert caller.deltas[-1].error == "the engine has stopped"
    assert slow.phase == "stopped"
    assert slow.stats().failed == 6
    slow.check_integrity()


def test_close_twice_and_use_afterwards(started, client):
    started.close()
    started.close()
    with pytest.raises(QueueFullError, match="shutting down"):
        client.submit(started, [1], SHORT).result()
    with pytest.raises(EngineDeadError):
        started.generate([[1]], SHORT, progress=False)
    started.drain(0.0)
    assert started.phase == "stopped"
    started.check_integrity()


def test_a_reservation_from_before_the_close_gets_an_error(started, client):
    reservation = started.reserve()
    started.close()
    with reservation:
        assert client.submit(started, [1], SHORT, reservation=reservation).result().finish is Finish.ERROR
    started.check_integrity()


@pytest.mark.parametrize("where", ["decode", "advance", "begin", "finish", "score"])
def test_death_of_the_thread_is_told_to_everybody(started, client, monkeypatch, where):
    """Whatever raises inside, nobody waits for ever, and the engine says that it has failed."""
    broken = RuntimeError("the device is on fire")
    calls = []

    def fail(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise broken
        return working(*arguments, **options)

    working = getattr(started._runner, where)
    monkeypatch.setattr(started._runner, where, fail)
    params = SamplingParams(max_tokens=600, ignore_eos=True, prompt_logprobs=0)
    callers = [client.submit(started, tiny.prompt(300, i), params) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        batch = pool.submit(started.generate, [[1], [2]], LONG, progress=False)
        with pytest.raises(EngineDeadError):
            batch.result(PATIENCE)
    for caller in callers:
        try:
            assert caller.result().finish is Finish.ERROR
        except (EngineDeadError, QueueFullError):
            assert not caller.deltas  # came too late
    assert started.failure is broken
    assert started.phase == "failed"
    with pytest.raises(EngineDeadError, match="failed"):
        started.generate([[1]], SHORT, progress=False)
    with pytest.raises(EngineDeadError, match="failed"):
        client.submit(started, [1], SHORT).result()
    started.drain(PATIENCE)  # at once
    started.check_integrity()
    started.close()
    assert started.phase == "failed"


def test_a_caller_whose_event_loop_is_gone_harms_nobody(started, client, caplog):
    """Its loop is closed while the engine still has tokens for it."""

    async def leave_it_open():
        stream = started.stream(tiny.prompt(5), LONG)
        await anext(stream)
        return stream

    def abandon():
        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(leave_it_open())
        loop.close()
        return stream

    with concurrent.futures.ThreadPoolExecutor() as pool:
        stream = pool.submit(abandon).result(PATIENCE)
    other = client.submit(started, tiny.prompt(7), SamplingParams(max_tokens=40, ignore_eos=True))
    assert other.result().finish is Finish.LENGTH
    asyncio.run(stream.aclose())
    settle(started)
    assert started.stats().cancelled == 1
    assert not caplog.records


def test_a_failing_tokenizer_fails_one_request(started, client, monkeypatch):
    healthy = client.submit(started, tiny.prompt(20), SamplingParams(max_tokens=100, ignore_eos=True))
    healthy.wait_for(1)
    decode = started.tokenizer.decode
    poisoned = 77

    def fail(ids, *arguments, **options):
        if poisoned in ids:
            raise ValueError("no such token")
        return decode(ids, *arguments, **options)

    monkeypatch.setattr(started.tokenizer, "decode", fail)
    params = SamplingParams(max_tokens=5, temperature=0.0, logit_bias={poisoned: 100.0})
    sick = client.submit(started, tiny.prompt(20), params).result()
    assert sick.finish is Finish.ERROR
    assert sick.tokens == ()
    assert healthy.result().finish is Finish.LENGTH
    with pytest.raises(RequestFailedError, match="while its text was being written"):
        started.generate([tiny.prompt(20)], params, progress=False)
    settle(started)
    assert started.stats().failed == 2


def test_threads_end(started):
    started.close()
    assert not [thread for thread in threading.enumerate() if thread is started._loop._thread]


def test_what_cannot_be_started_says_why(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer can be read"):
        Engine.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_model_len=1001 is more than the 1000 tokens"):
        Engine.from_pretrained(folder, EngineConfig(max_model_len=1001))
    many = dataclasses.replace(tiny.CONFIG, eos_token_ids=tuple(range(9)))
    with pytest.raises(ValueError, match="the model has 9 end-of-sequence tokens; at most 8"):
        Engine(folder, many, Tokenizer.from_pretrained(folder), EngineConfig())
    without_weights = shutil.copytree(folder, tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    for engine, error, message in (
        (Engine.from_pretrained(without_weights), FileNotFoundError, "has neither model.safetensors nor"),
        (Engine.from_pretrained(folder, EngineConfig(tensor_parallel_size=64)), ValueError, "but JAX sees"),
    ):
        with pytest.raises(error, match=message), engine:
            pass
        engine.close()
        assert engine.phase == "stopped"
        assert engine.stats().submitted == 0
