"""Views that are not selected anew: an output ends with their room, and says so."""

import dataclasses

import pytest

from kvjax.engine import Engine, EngineConfig, Finish
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle

CONTEXT, BUDGET, ROOM = 120, 40, 16


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = EngineConfig(
        max_model_len=CONTEXT, max_num_seqs=1, method="streaming", token_budget=BUDGET, headroom=ROOM, reselect=False
    )
    with Engine.from_pretrained(tiny.write(tmp_path_factory.mktemp("headroom")), config) as engine:
        yield engine
        settle(engine)


@pytest.mark.parametrize(
    ("length", "asked", "budget", "headroom"),
    [
        (60, None, None, ROOM),
        (60, ROOM + 2, None, ROOM),
        (60, ROOM + 1, None, None),
        (30, None, None, ROOM + 10),  # the prompt leaves some of what is kept of longer ones
        (30, None, 20, ROOM),
        (CONTEXT - 8, None, None, None),
    ],
)
def test_an_output_that_ends_with_the_room_says_the_way_out(engine, length, asked, budget, headroom):
    params = dataclasses.replace(GREEDY, max_tokens=asked, token_budget=budget)
    [completion] = generate(engine, [(tiny.prompt(length), params)])
    assert completion.finish is Finish.LENGTH
    if headroom is None:
        assert (len(completion.tokens), completion.stop_reason) == (asked or CONTEXT - length, None)
        return
    assert len(completion.tokens) == headroom + 1
    said = f"the views' headroom of {headroom} tokens is used up: raise --headroom, or drop --when-full stop"
    assert completion.stop_reason == said


def test_a_prompt_that_leaves_no_room_says_the_way_out(engine):
    prompt = tiny.prompt(80)
    params = dataclasses.replace(GREEDY, max_tokens=1, compress_after=80 - ROOM)
    assert len(generate(engine, [(prompt, params)])[0].tokens) == 1
    message = (
        f"behind compress_after={79 - ROOM} is 1 tokens longer than the views' headroom of {ROOM}: select later, or "
        f"start the engine with --headroom {ROOM + 1} or without --when-full stop"
    )
    with pytest.raises(ValueError, match=message):
        generate(engine, [(prompt, dataclasses.replace(params, compress_after=79 - ROOM))])
