"""A compressed engine says what the model says when an oracle chooses what each step may see."""

import dataclasses

import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig
from tests.engine import tiny
from tests.engine.client import GREEDY, generate
from tests.engine.reference import Reference

CONTEXT, ROOM = 640, 24
BUDGETS = {"rocketkv": 64, "rocketkv-faithful": 48, "snapkv": 40, "streaming": 40, "quest": 64, "topk": 24}


def check(
    engine: Engine,
    prompt: list[int],
    new: int,
    compress_after: int | None = None,
    turn: int | None = None,
    begin: int = 0,
) -> None:
    """`begin` is where the turn is expected to begin for this method."""
    params = dataclasses.replace(
        GREEDY, max_tokens=new, logprobs=5, compress_after=compress_after, turn=turn, retained=True
    )
    before = engine.stats().compiles_after_warmup
    [completion] = generate(engine, [(prompt, params)])
    assert engine.stats().compiles_after_warmup == before
    assert len(completion.tokens) == new
    reference = Reference(engine.caches)
    chosen = compress_after if engine.caches.window else None  # where no view chooses, the prompt is read as a whole
    logits = reference.prefill(prompt[:chosen], begin)
    if chosen is None:
        for rows, retained in zip(reference.rows, completion.retained, strict=True):
            for row, positions in zip(rows, retained, strict=True):
                assert sorted(positions[positions >= 0]) == row.positions[-len(positions) :]
    for token in prompt[chosen:] if chosen else ():
        logits = reference.step(token)
    for token, told in zip(completion.tokens, completion.logprobs, strict=True):
        expected = tiny.log_softmax(logits)
        ours = np.array([value for _, value in told.top])
        np.testing.assert_allclose(ours, expected[[i for i, _ in told.top]], atol=2e-3)
        np.testing.assert_allclose(ours, np.sort(expected)[::-1][: len(ours)], atol=2e-3)
        logits = reference.step(token)


@pytest.fixture(scope="module", params=BUDGETS)
def compressed(request, tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp(request.param))
    config = EngineConfig(
        max_model_len=CONTEXT, max_num_seqs=2, method=request.param, token_budget=BUDGETS[request.param], headroom=ROOM
    )
    with Engine.from_pretrained(path, config) as engine:
        yield engine


@pytest.mark.parametrize("length", [20, 257, 600])
def test_each_token_is_what_the_oracle_lets_the_model_say(compressed, length):
    check(compressed, tiny.prompt(length), new=12)
    compressed.check_integrity()


def test_an_output_longer_than_the_room_goes_on_from_a_new_selection(compressed):
    check(compressed, tiny.prompt(300), new=3 * ROOM + 5)


def test_what_comes_after_a_selection_is_read_through_the_view(compressed):
    """So it sees no more than decoded tokens do, and its length may exceed the room."""
    prompt = tiny.prompt(400)
    check(compressed, prompt, new=8, compress_after=len(prompt) - ROOM - 7)


@pytest.mark.parametrize("turn", [1, 90, 600])
def test_a_turn_is_chosen_for_by_its_own_queries(turns, turn):
    """The last min(W, turn) of them; and so is what an output goes on with, whose tokens belong to the turn."""
    check(turns, tiny.prompt(500), new=2 * ROOM + 5, turn=turn, begin=max(500 - turn, 0))
    turns.check_integrity()


@pytest.mark.parametrize(("compress_after", "begin"), [(470, 440), (441, 440), (440, 0), (300, 0)])
def test_a_turn_behind_the_selection_chooses_nothing(turns, compress_after, begin):
    check(turns, tiny.prompt(500), new=4, compress_after=compress_after, turn=60, begin=begin)


def test_methods_of_one_turn_choose_by_the_last_queries_whatever_the_turn(compressed):
    check(compressed, tiny.prompt(400), new=4, turn=5)


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("turns"))
    config = EngineConfig(max_model_len=CONTEXT, max_num_seqs=2, method="rocketkv-mt", token_budget=96, headroom=ROOM)
    with Engine.from_pretrained(path, config) as engine:
        assert engine.caches.window == 128
        yield engine
