"""`/v1/completions` through openai-python and plain HTTP: prompts, choices, text, log-probabilities."""

import dataclasses
import json
import math

import pytest
from fake_engine import BOS, EOS, REPLY, FakeEngine

from kvjax.serve.replies import CompletionChunk, CompletionObject
from kvjax.serve.schema import choice_seed

GREEDY = {"temperature": 0, "max_tokens": 32}


def events(response) -> list[dict]:
    """The events of a stream; checks the framing and that it ends with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame for frame in response.text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame[6:]) for frame in frames[:-1]]


@pytest.mark.parametrize(
    ("prompt", "seen"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["hi", "yo"], [[BOS, 104, 105], [BOS, 121, 111]]),
        ([104, 105], [[104, 105]]),
        ([[104, 105], [121]], [[104, 105], [121]]),
    ],
    ids=["string", "strings", "tokens", "token lists"],
)
def test_all_forms_of_a_prompt_reach_the_engine(server, prompt, seen):
    answer = server.client().completions.create(model="fake", prompt=prompt, **GREEDY)
    assert sorted(ids for ids, *_ in server.engine.asked) == sorted(seen)
    assert [choice.index for choice in answer.choices] == list(range(len(seen)))
    assert all(choice.text == REPLY and choice.finish_reason == "stop" for choice in answer.choices)
    assert answer.usage.prompt_tokens == sum(map(len, seen))
    assert answer.usage.completion_tokens == len(seen) * (len(REPLY.encode()) + 1)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(serve):
    def script(prompt, params):
        return [*f"{bytes(prompt).decode()}-{params.seed}".encode(), EOS]

    server = serve(FakeEngine(script=script, slots=3))
    body = {"prompt": [[97], [98]], "n": 3, "seed": 7, "max_tokens": 40}
    answer = server.post("/v1/completions", body).json()
    seeds = [choice_seed(7, index) for index in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    expected = [f"{prompt}-{seed}" for prompt in "ab" for seed in seeds]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 2  # each prompt once, however many choices it has


def test_a_seed_repeats_the_text_and_choices_differ(server):
    create = server.client().completions.create
    first, again = (create(model="fake", prompt="x", seed=3, n=4) for _ in range(2))
    alone = create(model="fake", prompt="x", seed=3)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 4
    assert alone.choices[0].text == texts[0]
    unseeded = {create(model="fake", prompt="x").choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_parameters_reach_the_engine(server):
    body = {
        "prompt": "x",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 2, "6": -100},
        "seed": 11,
        "stop": "a",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2.0,
        "cache_salt": "s",
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
    }
    assert server.post("/v1/completions", body).status_code == 200
    [(_, params, salt, name)] = server.engine.asked
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    assert penalties == (1, -1.5, 1.2)
    assert params.logit_bias == {5: 2, 6: -100}
    assert (params.seed, params.stop, params.stop_token_ids) == (11, ("a",), (9,))
    assert (params.ignore_eos, params.min_tokens, params.max_tokens) == (True, 2, 3)
    assert params.logprobs is None
    assert params.prompt_logprobs is None
    assert salt == "s"
    assert name.startswith("cmpl-")


def test_defaults_are_openais(server):
    server.post("/v1/completions", {"prompt": "x", "model": None, "n": None, "stop": None, "stream": None})
    [(_, params, salt, _)] = server.engine.asked
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert (params.stop, params.seed, salt) == ((), None, "")


@pytest.mark.parametrize("stop", ["wör", ["zzz", "wör"]])
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(server, stop):
    create = server.client().completions.create
    answer = create(model="fake", prompt="x", stop=stop, **GREEDY)
    assert answer.choices[0].text == "Hello, "
    assert answer.choices[0].finish_reason == "stop"
    streamed = create(model="fake", prompt="x", stop=stop, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello, "
    raw = server.post("/v1/completions", {"prompt": "x", "stop": stop} | GREEDY).json()
    assert raw["choices"][0]["stop_reason"] == "wör"


def test_max_tokens_ends_the_text(server):
    answer = server.client().completions.create(model="fake", prompt="x", temperature=0, max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello", "length")


def test_a_stream_says_the_same_as_the_whole(server):
    body = {"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 20, "logprobs": 2, "echo": True}
    whole = server.post("/v1/completions", body).json()
    parts = events(server.post("/v1/completions", body | {"stream": True}))
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        mine = [part["choices"][0] for part in parts if part["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for column in choice["logprobs"]:
            joined = [value for part in mine for value in part["logprobs"][column]]
            assert joined == choice["logprobs"][column]
        assert [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_usage_of_a_stream_comes_last_and_only_if_asked(server):
    body = {"prompt": "x", "stream": True} | GREEDY
    plain = events(server.post("/v1/completions", body))
    assert all("usage" not in part and part["choices"] for part in plain)
    *parts, last = events(server.post("/v1/completions", body | {"stream_options": {"include_usage": True}}))
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    generated = len(REPLY.encode()) + 1
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": generated,
        "total_tokens": generated + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_continuous_usage_counts_up(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "x", "stream": True, "stream_options": options} | GREEDY
    parts = events(server.post("/v1/completions", body))
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == counts[-2] == len(REPLY.encode()) + 1


def test_an_event_is_ascii_and_whole_characters(server):
    response = server.post("/v1/completions", {"prompt": "x", "stream": True} | GREEDY)
    assert response.content.isascii()
    text = "".join(part["choices"][0]["text"] for part in events(response))
    assert text == REPLY


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_documented_shape(server, stream):
    body = {"prompt": "x", "n": 2, "echo": True, "logprobs": 1, "stream": stream} | GREEDY
    response = server.post("/v1/completions", body)
    if not stream:
        CompletionObject.model_validate(response.json())
        return
    for event in events(response):
        CompletionChunk.model_validate(event)


class TestLogprobs:
    def test_columns_line_up_with_the_text(self, server):
        answer = server.post("/v1/completions", {"prompt": "x", "logprobs": 2} | GREEDY).json()
        columns = answer["choices"][0]["logprobs"]
        assert columns["tokens"][:3] == ["H", "e", "l"]
        assert columns["tokens"][-1] == "</s>"
        assert columns["tokens"][8:10] == ["bytes:\\xc3", "bytes:\\xb6"]  # the two halves of an ö
        assert columns["text_offset"][:3] == [0, 1, 2]
        assert columns["text_offset"][8:11] == [8, 8, 9]
        assert columns["text_offset"][-1] == len(REPLY)
        assert columns["token_logprobs"][:2] == [-0.25, -1.5]
        assert columns["top_logprobs"][1] == {"d": -0.25, "e": -1.5}

    def test_zero_alternatives_still_give_the_token_itself(self, server):
        answer = server.post("/v1/completions", {"prompt": "x", "logprobs": 0} | GREEDY).json()
        assert answer["choices"][0]["logprobs"]["top_logprobs"][:2] == [{"H": -0.25}, {"e": -1.5}]

    def test_minus_infinity_is_a_number(self, server):
        answer = server.post("/v1/completions", {"prompt": "x", "logprobs": 3} | GREEDY)
        assert answer.json()["choices"][0]["logprobs"]["top_logprobs"][0]["\x00"] == -9999.0

    def test_none_are_given_unless_asked_for(self, server):
        answer = server.post("/v1/completions", {"prompt": "x"} | GREEDY).json()
        assert answer["choices"][0]["logprobs"] is None


class TestEcho:
    def test_the_text_begins_with_the_prompt(self, server):
        create = server.client().completions.create
        assert create(model="fake", prompt="höi ", echo=True, **GREEDY).choices[0].text == f"höi {REPLY}"
        tokens = list("höi ".encode())
        assert create(model="fake", prompt=tokens, echo=True, **GREEDY).choices[0].text == f"höi {REPLY}"

    def test_without_generating(self, server):
        answer = server.post("/v1/completions", {"prompt": "hé", "echo": True, "max_tokens": 0, "logprobs": 1})
        [choice] = answer.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("hé", "length")
        columns = choice["logprobs"]
        assert columns["tokens"] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9"]
        assert columns["token_logprobs"] == [None, -0.25, -1.5, -1.5]
        assert columns["top_logprobs"][0] is None
        assert columns["text_offset"] == [0, 0, 1, 1]
        assert answer.json()["usage"]["completion_tokens"] == 0

    @pytest.mark.parametrize("max_tokens", [0, 1])
    def test_as_lm_eval_scores_continuations(self, server, max_tokens):
        """The arithmetic of its `local-completions`: from `ctxlen` on, without the generated token."""
        context, continuation = [97, 98, 99], [100, 101]
        body = {
            "model": "fake",
            "prompt": [context + continuation, [*context, 100, 102]],
            "temperature": 0,
            "max_tokens": max_tokens,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = server.post("/v1/completions", body).json()
        scores = []
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
            end = -1 if max_tokens else None
            values = choice["logprobs"]["token_logprobs"][len(context) : end]
            tops = choice["logprobs"]["top_logprobs"][len(context) : end]
            greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
            scores.append((sum(values), greedy))
        assert scores == [(-1.75, False), (-0.5, True)]
        assert all(math.isfinite(score) for score, _ in scores)


def test_cached_tokens_are_reported(serve):
    class Warm(FakeEngine):
        async def stream(self, *args, **options):
            async for delta in super().stream(*args, **options):
                yield dataclasses.replace(delta, cached_tokens=2)

    body = {"prompt": ["abc", "xyz"], "n": 2} | GREEDY
    usage = serve(Warm()).post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}  # two prompts, not four choices
