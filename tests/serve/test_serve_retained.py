"""What a request may ask of the views: `return_retained` and `compress_after`; and what the server tells of them."""

import numpy as np
import pytest
from fake_engine import FakeEngine
from test_serve_completions import events
from test_serve_errors import error_of

from kvjax.engine import Engine, EngineConfig
from kvjax.serve.replies import ChatCompletion, ChatCompletionChunk, CompletionChunk, CompletionObject
from kvjax.serve.retained import summarise
from tests.engine import tiny

COMPLETION = {"prompt": [7] * 40, "temperature": 0, "max_tokens": 4, "return_retained": True}
CHAT = {"messages": [{"role": "user", "content": "x" * 30}], "temperature": 0, "max_tokens": 4, "return_retained": True}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


class TestSummary:
    def test_shares_are_means_over_heads(self):
        layers = [np.array([[0, 1, -1], [0, 5, 9]])]
        assert summarise(layers, 10) == {
            "prompt_tokens": 10,
            "bins": 10,
            "layers": [[1.0, 0.5, 0, 0, 0, 0.5, 0, 0, 0, 0.5]],
        }

    @pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 300, 511, 512, 1000, 131072])
    def test_nothing_of_the_prompt_is_lost(self, length):
        retained = np.random.default_rng(length).permutation(length)[: length // 3 + 1][None]
        summary = summarise([retained, np.arange(length)[None]], length)
        bins, (some, every) = summary["bins"], summary["layers"]
        assert len(some) == len(every) == bins == min(length, 256)
        assert every == [1.0] * bins
        widths = np.diff([index * length // bins for index in range(bins + 1)])
        assert np.dot(widths, some) == pytest.approx(len(retained[0]), abs=0.0005 * length + 1e-9)

    def test_positions_that_are_not_the_prompts_do_not_count(self):
        assert summarise([np.array([[3, 4, 5, -1]])], 4)["layers"] == [[0, 0, 0, 1.0]]

    def test_layers_may_differ_in_heads_and_room(self):
        layers = [np.array([[0, 1]]), np.array([[0], [0], [1], [-1]])]
        assert summarise(layers, 2)["layers"] == [[1.0, 1.0], [0.5, 0.25]]


class TestReturnRetained:
    @pytest.mark.parametrize("path", PATHS)
    def test_whole_answers_tell_it_with_each_choice(self, server, path):
        answer = server.post(path, PATHS[path] | {"n": 2}).json()
        (ChatCompletion if "chat" in path else CompletionObject).model_validate(answer)
        length = answer["usage"]["prompt_tokens"]
        assert len(answer["choices"]) == 2
        for choice in answer["choices"]:
            retained = choice["kvjax"]["retained"]
            assert (retained["prompt_tokens"], retained["bins"]) == (length, length)
            assert retained["layers"] == [[0.0] * (length - 8) + [1.0] * 8, [0.5] * length]
            assert choice["kvjax"]["view_fraction"] == 1

    @pytest.mark.parametrize("path", PATHS)
    def test_streams_tell_it_once_with_the_end_of_each_choice(self, serve, path):
        engine = FakeEngine()
        engine.view_fraction = 0.123456
        server = serve(engine)
        body = PATHS[path] | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
        parts = events(server.post(path, body))
        for part in parts:
            (ChatCompletionChunk if "chat" in path else CompletionChunk).model_validate(part)
        assert parts[-1]["choices"] == []
        ends = [part["choices"][0] for part in parts[:-1] if "kvjax" in part["choices"][0]]
        assert sorted(choice["index"] for choice in ends) == [0, 1]
        assert all(choice["finish_reason"] for choice in ends)
        assert [choice["kvjax"]["view_fraction"] for choice in ends] == [0.1235] * 2
        assert len(ends[0]["kvjax"]["retained"]["layers"]) == 2

    def test_each_prompt_has_its_own(self, server):
        answer = server.post("/v1/completions", COMPLETION | {"prompt": [[7] * 20, [7] * 30]}).json()
        assert [choice["kvjax"]["retained"]["prompt_tokens"] for choice in answer["choices"]] == [20, 30]

    def test_scoring_alone_tells_it_too(self, server):
        body = COMPLETION | {"max_tokens": 0, "echo": True, "logprobs": 1}
        assert server.post("/v1/completions", body).json()["choices"][0]["kvjax"]["retained"]["bins"] == 40

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("asked", [{}, {"return_retained": None}, {"return_retained": False}])
    def test_nothing_is_told_unless_asked_for(self, server, path, asked):
        body = {name: value for name, value in PATHS[path].items() if name != "return_retained"} | asked
        assert "kvjax" not in server.post(path, body).json()["choices"][0]
        assert "kvjax" not in server.post(path, body | {"stream": True}).text
        assert not any(params.retained for _, params, _, _ in server.engine.asked)

    def test_openai_clients_read_it(self, server):
        create = server.client().completions.create
        asked = {"model": "fake", "prompt": COMPLETION["prompt"], "extra_body": {"return_retained": True}}
        assert create(**asked).choices[0].kvjax["retained"]["bins"] == 40
        *_, last = create(**asked, stream=True)
        assert last.choices[0].kvjax["retained"]["bins"] == 40


class TestSelectAfter:
    @pytest.mark.parametrize("path", PATHS)
    def test_it_reaches_the_engine(self, server, path):
        assert server.post(path, PATHS[path] | {"compress_after": 12}).status_code == 200
        assert server.engine.asked[-1][1].compress_after == 12

    def test_all_of_the_prompt_may_choose(self, server):
        assert server.post("/v1/completions", COMPLETION | {"compress_after": 40}).status_code == 200

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("stream", [False, True])
    def test_behind_the_prompt_is_refused(self, server, path, stream):
        error = error_of(server.post(path, PATHS[path] | {"compress_after": 500, "stream": stream}), 400)
        length = 40 if path == "/v1/completions" else len("<user>\n<assistant>") + 30
        assert error["param"] == "compress_after"
        assert f"give 1 to {length}, or leave it out" in error["message"]
        assert not server.engine.asked

    def test_of_several_prompts_the_shortest_counts(self, server):
        body = COMPLETION | {"prompt": [[7] * 20, [7] * 5], "compress_after": 10}
        assert "5 tokens of the prompt" in error_of(server.post("/v1/completions", body), 400)["message"]

    @pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, 2**31])
    def test_what_is_no_such_number(self, server, value):
        error = error_of(server.post("/v1/completions", COMPLETION | {"compress_after": value}), 400)
        assert error["param"] == "compress_after"

    @pytest.mark.parametrize("value", [1, "yes", []])
    def test_kept_is_true_or_false(self, server, value):
        error = error_of(server.post("/v1/completions", COMPLETION | {"return_retained": value}), 400)
        assert error["param"] == "return_retained"

    def test_a_prompt_is_scored_whole(self, server):
        body = COMPLETION | {"compress_after": 3, "echo": True}
        error = error_of(server.post("/v1/completions", body | {"logprobs": 0}), 400)
        assert error["param"] == "compress_after"
        assert "leave it out" in error["message"]
        assert server.post("/v1/completions", body).status_code == 200

    def test_the_engines_own_refusal_names_the_field(self, serve):
        engine = FakeEngine()
        engine.raise_at_stream = ValueError(
            "the prompt behind compress_after=3 is 9 tokens longer than the views' headroom"
        )
        error = error_of(serve(engine).post("/v1/completions", COMPLETION | {"compress_after": 3}), 400)
        assert (error["param"], "9 tokens longer" in error["message"]) == ("compress_after", True)


def test_the_state_tells_what_the_views_keep(server):
    assert server.get("/state").json()["compression"] == {
        "method": "rocketkv",
        "token_budget": 64,
        "headroom": 16,
        "retained_tokens": [100, 512],
        "retained_share": round((100 + 512) / 1024, 4),
        "read_share": 0.1,
    }


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A real one, of random weights, whose first layer slides over 100 tokens."""
    config = EngineConfig(max_model_len=320, max_num_seqs=1, method="rocketkv", token_budget=48, headroom=24)
    with Engine.from_pretrained(tiny.write(tmp_path_factory.mktemp("tiny")), config) as engine:
        yield engine


@pytest.mark.heavy
def test_what_the_views_of_an_engine_keep(engine, serve):
    server, prompt = serve(engine), tiny.prompt(300)
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 3, "return_retained": True}
    [choice] = server.post("/v1/completions", body).json()["choices"]
    retained, keep = choice["kvjax"]["retained"], engine.caches.plans[1].max_retained
    assert (retained["prompt_tokens"], retained["bins"], len(retained["layers"])) == (300, 256, 3)
    widths = np.diff([index * 300 // 256 for index in range(257)])
    sliding, *choosing = (np.asarray(layer) for layer in retained["layers"])
    assert np.dot(widths, sliding) == pytest.approx(tiny.WINDOW, abs=0.2)
    assert sliding[-80:].min() == 1
    for layer in choosing:
        assert np.dot(widths, layer) == pytest.approx(keep, abs=0.2)
        assert layer[-20:].min() == 1  # the observation window stays
    assert choice["kvjax"]["view_fraction"] == pytest.approx(
        engine.caches.retained_bytes(300) / engine.caches.full_bytes(300), abs=1e-4
    )
    earlier = server.post("/v1/completions", body | {"compress_after": 250}).json()["choices"][0]
    assert earlier["kvjax"]["retained"]["layers"] != retained["layers"]
    state = server.get("/state").json()["compression"]
    assert (state["method"], state["token_budget"]) == ("rocketkv", 48)
    assert state["retained_tokens"] == [tiny.WINDOW, keep, keep]
    assert 0 < state["read_share"] < state["retained_share"] < 1
    said = engine.startup_report()
    assert f"keeps       rocketkv, token budget 48: all 100 entries in 1 layer, {keep} of 320 entries in 2" in said
    share = engine.caches.retained_bytes(320) / engine.caches.full_bytes(320)
    assert f"{100 * share:.3g}% of the full cache's bytes; a step reads" in said
