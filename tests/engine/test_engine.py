"""What the engine answers is what the model says, and nobody else's business."""

import dataclasses
import threading

import numpy as np
import pytest

from kvjax.engine import (
    Completion,
    ContextLengthExceededError,
    Engine,
    EngineConfig,
    Finish,
    QueueFullError,
    SamplingParams,
)
from tests.engine import tiny
from tests.engine.client import GREEDY, PATIENCE, generate, settle
from tests.engine.conftest import CHUNK, CONFIG, SLOTS

LENGTHS = [1, 2, 64, 65, 99, 100, 101, 255, 256, 257, 511, 512, 513, 700, 990, tiny.CONTEXT - 1]


def check_against_dense(completion: Completion) -> None:
    """Each token is the best one after those before it, and log-probabilities are the model's."""
    dense = tiny.logprobs([*completion.prompt_tokens, *completion.tokens])
    after = dense[len(completion.prompt_tokens) - 1 : -1]
    assert completion.tokens == tuple(after.argmax(axis=-1))
    for token, logprob, row in zip(completion.tokens, completion.logprobs, after, strict=True):
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in logprob.top] == np.argsort(-row)[: len(logprob.top)].tolist()
        np.testing.assert_allclose(
            [value for _, value in logprob.top], np.sort(-row)[: len(logprob.top)] * -1, atol=1e-4
        )


def test_greedy_answers_are_those_of_the_dense_model(engine):
    """Prompts around the borders of chunks, blocks and the window; some generate up to the end of the context."""
    requests = [
        (tiny.prompt(n), dataclasses.replace(GREEDY, max_tokens=min(20, tiny.CONTEXT - n), logprobs=5)) for n in LENGTHS
    ]
    for (prompt, params), completion in zip(requests, generate(engine, requests), strict=True):
        assert completion.prompt_tokens == tuple(prompt)
        assert len(completion.tokens) == params.max_tokens
        assert completion.finish is Finish.LENGTH
        check_against_dense(completion)


def test_a_long_answer_turns_the_ring_and_fills_the_context(engine):
    [completion] = generate(engine, [(tiny.prompt(650), dataclasses.replace(GREEDY, max_tokens=None, logprobs=1))])
    assert len(completion.tokens) == tiny.CONTEXT - 650
    assert completion.finish is Finish.LENGTH
    check_against_dense(completion)


@pytest.mark.parametrize("length", [1, 2, 256, 257, 700])
def test_log_probabilities_of_a_prompt_are_those_of_the_dense_model(engine, length):
    prompt = tiny.prompt(length)
    [scored, both] = generate(
        engine,
        [
            (prompt, SamplingParams(max_tokens=0, prompt_logprobs=3)),
            (prompt, dataclasses.replace(GREEDY, prompt_logprobs=3, max_tokens=1)),
        ],
    )
    assert (scored.tokens, scored.text, scored.finish) == ((), "", Finish.LENGTH)
    assert scored.prompt_logprobs == both.prompt_logprobs
    first, *others = scored.prompt_logprobs
    assert first is None
    dense = tiny.logprobs(prompt)
    assert len(others) == length - 1
    for token, logprob, row in zip(prompt[1:], others, dense, strict=False):
        assert logprob.token == token
        assert logprob.logprob == pytest.approx(row[token], abs=1e-4)
        assert [i for i, _ in logprob.top] == np.argsort(-row)[:3].tolist()


MIXED = [
    (tiny.prompt(3), dataclasses.replace(GREEDY, logprobs=2)),
    (tiny.prompt(257), SamplingParams(seed=1, max_tokens=30, logprobs=0, ignore_eos=True)),
    (tiny.prompt(300), SamplingParams(seed=2, max_tokens=17, top_p=0.8, top_k=40, logprobs=20, prompt_logprobs=1)),
    (tiny.prompt(64), SamplingParams(seed=-3, max_tokens=40, min_p=0.1, temperature=1.3, frequency_penalty=0.5)),
    (tiny.prompt(700), SamplingParams(seed=4, max_tokens=9, repetition_penalty=1.2, presence_penalty=-0.5, logprobs=3)),
    (tiny.prompt(100), SamplingParams(seed=2**64 - 1, max_tokens=33, logit_bias={9: 3.0}, min_tokens=20)),
    (tiny.prompt(513), SamplingParams(max_tokens=0, prompt_logprobs=20)),
    (tiny.prompt(31), SamplingParams(seed=5, max_tokens=1, logprobs=1)),
]


@pytest.fixture(scope="module")
def alone(_engine):
    """Each of MIXED with the whole engine to itself."""
    return [generate(_engine, [request])[0] for request in MIXED]


def test_an_answer_is_the_same_to_the_bit_among_others(engine, alone):
    assert generate(engine, MIXED) == alone
    assert generate(engine, MIXED[::-1]) == alone[::-1]


@pytest.mark.parametrize("busy", range(SLOTS))
def test_an_answer_is_the_same_to_the_bit_in_any_slot(engine, client, alone, busy):
    """The slots below are taken by long requests; others come, are cancelled, and leave things behind."""
    endless = SamplingParams(max_tokens=300, ignore_eos=True, temperature=5.0)
    holding = [client.submit(engine, tiny.prompt(20 + i, busy), endless) for i in range(busy)]
    for caller in holding:
        caller.wait_for(1)
    for number, ((prompt, params), want) in enumerate(zip(MIXED, alone, strict=True)):
        leaving = [
            client.submit(engine, tiny.prompt(50 + 90 * number, i), endless, leave_after=1 + i) for i in range(2)
        ]
        caller = client.submit(engine, prompt, params, request_id="watched")
        leaving.append(client.submit(engine, tiny.prompt(600, number), endless, leave_after=1))
        assert caller.result() == want
        for other in leaving:
            other.wait()
    for caller in holding:
        caller.disconnect()
        caller.wait()


@pytest.fixture(scope="module")
def one_slot(folder):
    config = EngineConfig(max_num_seqs=1, max_model_len=512, decode_steps=1, prefill_chunk_size=CHUNK)
    with Engine.from_pretrained(folder, config) as engine:
        yield engine
        settle(engine)


def test_one_slot_gives_the_same_tokens_as_four(engine, one_slot):
    requests = [(tiny.prompt(n), GREEDY) for n in (1, 90, 255, 256, 257, 480)]
    requests += [(prompt, dataclasses.replace(params, logprobs=None)) for prompt, params in MIXED if len(prompt) < 450]
    wide, narrow = generate(engine, requests), generate(one_slot, requests)
    for one, other in zip(wide, narrow, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)


def test_a_seed_is_an_answer(engine, one_slot):
    """In another slot, in another batch, in another engine; and another seed is another answer."""
    prompt = tiny.prompt(40)
    params = [SamplingParams(seed=seed, max_tokens=24, ignore_eos=True) for seed in range(6)]
    together = [completion.tokens for completion in generate(engine, [(prompt, each) for each in params])]
    assert len(set(together)) == 6
    assert [c.tokens for c in generate(one_slot, [(prompt, each) for each in params[::-1]])] == together[::-1]
    unseeded = SamplingParams(max_tokens=24, ignore_eos=True)
    assert len({completion.tokens for completion in generate(engine, [(prompt, unseeded)] * 4)}) == 4


@pytest.mark.usefixtures("_engine")  # has compiled what these need
def test_unseeded_requests_of_equal_engines_are_equal(folder):
    answers = []
    for seed in (3, 3, 4):
        with Engine.from_pretrained(folder, dataclasses.replace(CONFIG, seed=seed)) as engine:
            answers.append([c.tokens for c in generate(engine, [(tiny.prompt(9), SamplingParams(max_tokens=12))] * 3)])
            settle(engine)
    assert answers[0] == answers[1] != answers[2]


def test_streams_are_the_same_as_batches(engine, client, alone):
    for (prompt, params), want in zip(MIXED, alone, strict=True):
        caller = client.submit(engine, prompt, params)
        assert caller.result() == want
        *before, last = caller.deltas
        assert last.timing is not None
        assert last.timing.arrived <= last.timing.scheduled <= last.timing.first_token <= last.timing.finished
        assert last.timing.prefix == {"computed": len(prompt)}
        for delta in before:
            assert delta.finish is delta.timing is None
            assert delta.tokens
        for delta in caller.deltas[1:]:
            assert delta.prompt_logprobs is None


def test_what_cannot_be_served_is_refused_before_it_is_queued(engine, client):
    cases = [
        ([], SamplingParams(), "the prompt is empty"),
        (
            [1, tiny.VOCAB],
            SamplingParams(),
            rf"token ids must be in \[0, {tiny.VOCAB}\); the prompt has 1 to {tiny.VOCAB}",
        ),
        ([-1], SamplingParams(), "the prompt has -1 to -1"),
        ([1], SamplingParams(logit_bias={tiny.VOCAB: 1.0}), f"logit_bias: token {tiny.VOCAB} is outside"),
        ([1], SamplingParams(allowed_token_ids=(9999,)), "allowed_token_ids: token 9999 is outside"),
        ([1], SamplingParams(stop_token_ids=(-1,)), "stop_token_ids: token -1 is outside"),
    ]
    submitted = engine.stats().submitted
    for prompt, params, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.generate([[1], prompt], params, progress=False)
        with pytest.raises(ValueError, match=message):
            client.submit(engine, prompt, params).result()
    assert engine.stats().submitted == submitted


def test_the_context_is_a_bound_to_the_token(engine, client):
    full = tiny.prompt(tiny.CONTEXT)
    cases = [(full, 1), (full, None), (full[:-1], 2), ([*full, 1], 0), ([1], tiny.CONTEXT)]
    for prompt, most in cases:
        with pytest.raises(ContextLengthExceededError) as caught:
            client.submit(engine, prompt, SamplingParams(max_tokens=most)).result()
        error = caught.value
        assert (error.prompt_tokens, error.max_tokens, error.max_model_len) == (
            len(prompt),
            most or (1 if most is None else 0),
            tiny.CONTEXT,
        )
        with pytest.raises(ContextLengthExceededError):
            engine.generate([prompt], SamplingParams(max_tokens=most), progress=False)
    [scored] = generate(engine, [(full, SamplingParams(max_tokens=0, prompt_logprobs=0))])
    assert len(scored.prompt_logprobs) == tiny.CONTEXT


def test_overload_is_refused_and_places_come_back(engine, client):
    with engine.reserve(64):
        with pytest.raises(QueueFullError, match="64 of 64 places are taken, 1 more are asked for"):
            engine.reserve()
        with pytest.raises(QueueFullError):
            client.submit(engine, [1], GREEDY).result()
    with engine.reserve(2) as reservation:
        callers = [client.submit(engine, [1], GREEDY, reservation=reservation) for _ in range(2)]
        for caller in callers:
            assert caller.result().finish is Finish.LENGTH
        with pytest.raises(QueueFullError, match="no place left"):
            client.submit(engine, [1], GREEDY, reservation=reservation).result()
    with engine.reserve() as reservation, pytest.raises(ValueError, match="empty"):
        client.submit(engine, [], GREEDY, reservation=reservation).result()


def test_statistics_add_up(engine, client):
    before = engine.stats()
    callers = [client.submit(engine, tiny.prompt(300, i), GREEDY, request_id=f"r{i}") for i in range(6)]
    callers[0].wait_for(1)
    during = engine.stats()
    assert len(during.slots) == SLOTS
    assert during.running == sum(slot.state != "free" for slot in during.slots)
    assert sum(slot.state == "prefill" for slot in during.slots) <= 1
    for slot in during.slots:
        assert (slot.state == "free") == (slot.request_id == "")
        if slot.state == "decode":
            assert 300 <= slot.tokens <= 320
            assert slot.progress == 1.0
    for caller in callers:
        caller.result()
    settle(engine)
    after = engine.stats()
    assert after.submitted - before.submitted == after.finished - before.finished == 6
    assert after.prompt_tokens - before.prompt_tokens == 6 * 300
    assert after.generated_tokens - before.generated_tokens == 6 * 20
    assert after.prefill_units - before.prefill_units == 6 * 2 * 2  # chunks and groups
    assert 19 <= after.decode_steps - before.decode_steps <= 6 * 19
    assert after.waiting == after.running == 0
    assert 0 < after.busy_seconds - before.busy_seconds < PATIENCE


@pytest.mark.parametrize("most", [1, 2, 5, 6, 17])
def test_the_device_stops_at_the_limit_by_itself(engine, most):
    """The first token comes from the prompt, and no step is computed for nobody."""
    before = engine.stats().decode_steps
    generate(engine, [(tiny.prompt(30), dataclasses.replace(GREEDY, max_tokens=most))])
    settle(engine)
    assert engine.stats().decode_steps - before == most - 1


def test_statistics_show_a_prompt_being_read(engine, client, monkeypatch):
    """The engine's thread is held between two units of a prompt."""
    arrived, go_on = threading.Semaphore(0), threading.Semaphore(0)
    advance = engine._runner.advance

    def held(prefill):
        arrived.release()
        assert go_on.acquire(timeout=PATIENCE)
        return advance(prefill)

    monkeypatch.setattr(engine._runner, "advance", held)
    callers = [client.submit(engine, tiny.prompt(600, i), GREEDY, request_id=f"r{i}") for i in range(2)]
    seen = []
    for _ in range(6):  # 2 groups of layers, 3 chunks each
        assert arrived.acquire(timeout=PATIENCE)
        stats = engine.stats()
        seen.append(stats.slots[0])
        assert stats.running == 1
        go_on.release()
    assert {slot.state for slot in seen} == {"prefill"}
    assert {slot.request_id for slot in seen} == {"r0"}
    assert [slot.progress for slot in seen] == pytest.approx([i / 6 for i in range(6)])
    assert [slot.tokens for slot in seen] == [0, 100, 200, 300, 400, 500]
    assert arrived.acquire(timeout=PATIENCE)  # the second prompt begins when the first is done
    stats = engine.stats()
    assert [slot.state for slot in stats.slots] == ["decode", "prefill", "free", "free"]
    assert (stats.running, stats.waiting) == (2, 0)
    callers[1].disconnect()
    go_on.release()
    for _ in range(20):
        go_on.release()
    callers[1].wait()
    assert callers[0].result().finish is Finish.LENGTH
    assert len(callers[1].deltas) == 0


def test_a_text_prompt_and_an_empty_batch(engine):
    [of_text], [of_tokens] = (
        engine.generate([prompt], GREEDY, progress=False) for prompt in ("the end", engine.tokenizer.encode("the end"))
    )
    assert of_text == of_tokens
    assert engine.generate([], GREEDY, progress=False) == []
    with pytest.raises(ValueError, match="argument"):
        engine.generate([[1], [2]], [GREEDY], progress=False)
