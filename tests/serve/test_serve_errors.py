"""What is wrong is said in OpenAI's shape, with a 4xx, before anything is computed."""

import json
import logging

import openai
import pytest
from fake_engine import FakeEngine

from kvjax.engine.request import ContextLengthExceededError, EngineDeadError
from kvjax.serve.errors import ErrorReply
from kvjax.serve.limits import Limits

JSON = {"Content-Type": "application/json"}


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    ErrorReply.model_validate(response.json())
    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return response.json()["error"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", None, "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", [], "prompt"),
        ("prompt", [""], "prompt[0]"),
        ("prompt", [[]], "prompt[0]"),
        ("prompt", ["a", 1], "prompt[1]"),
        ("prompt", [1, "a"], "prompt[1]"),
        ("prompt", [1.5], "prompt[0]"),
        ("prompt", [True], "prompt[0]"),
        ("prompt", [-1], "prompt[0]"),
        ("prompt", [[1], [2**70]], "prompt[1][0]"),
        ("prompt", {"a": 1}, "prompt"),
        ("prompt", 7, "prompt"),
        ("prompt", [258], "prompt"),
        ("prompt", ["a"] * 3000, "prompt"),
        ("model", 7, "model"),
        ("n", 0, "n"),
        ("n", 9, "n"),
        ("n", "2", "n"),
        ("n", 1.5, "n"),
        ("n", True, "n"),
        ("best_of", 3, "best_of"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 10**400, "max_tokens"),
        ("max_tokens", "16", "max_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("top_p", 0, "top_p"),
        ("top_p", 1.01, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 2, "min_p"),
        ("presence_penalty", 2.5, "presence_penalty"),
        ("repetition_penalty", 0, "repetition_penalty"),
        ("logprobs", 21, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("stop", ["a"] * 17, "stop"),
        ("stop", "a" * 65, "stop"),
        ("stop", [""], "stop[0]"),
        ("stop", 5, "stop"),
        ("logit_bias", {"a": 1}, "logit_bias.a"),
        ("logit_bias", {"258": 1}, "logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", {str(i): 1 for i in range(301)}, "logit_bias"),
        ("stop_token_ids", [258], "stop_token_ids"),
        ("seed", 2**63, "seed"),
        ("seed", "x", "seed"),
        ("stream", "yes", "stream"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("min_tokens", 17, "min_tokens"),
        ("cache_salt", "x" * 257, "cache_salt"),
        ("suffix", "x", "suffix"),
        ("response_format", {"type": "xml"}, "response_format.type"),
        ("structured_outputs", {"regex": ""}, "structured_outputs.regex"),
        ("allowed_token_ids", [], "allowed_token_ids"),
        ("allowed_token_ids", [999], "allowed_token_ids"),
        ("bad_words", [" "], "bad_words"),
        ("use_beam_search", True, "use_beam_search"),
    ],
)
def test_a_bad_value_names_its_field(server, field, value, param):
    body = {"prompt": "x", "temperature": 0} | {field: value}
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"]
    assert not server.engine.asked


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "line 1"),
        (b"", "body"),
        (b"null", "body"),
        (b"[]", "body"),
        (b'"x"', "body"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": Infinity}', "Infinity"),
        (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "1e999"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "\\udc00": 1}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        ('{"prompt": "x"}'.encode("utf-16"), "UTF-8"),
        (b'{"prompt": "x", "deep": ' + b"[" * 200_000, "nested"),
        (b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_only_strict_json_is_read(server, body, reason):
    error = error_of(server.post("/v1/completions", content=body, headers=JSON), 400)
    assert reason in error["message"]
    assert not server.engine.asked


def test_a_whole_surrogate_pair_is_a_character(server):
    body = b'{"prompt": "\\ud83d\\ude42", "max_tokens": 1}'
    assert server.post("/v1/completions", content=body, headers=JSON).status_code == 200
    assert server.engine.asked[0][0][1:] == list("🙂".encode())


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_only_json_says_it_is_json(server, kind, path):
    headers = {} if kind is None else {"Content-Type": kind}
    assert error_of(server.post(path, content=b"{}", headers=headers), 415)["code"] == "unsupported_media_type"


def test_a_charset_is_no_obstacle(server):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert server.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_unknown_paths_and_methods(server):
    assert error_of(server.get("/v1/embeddings"), 404)["code"] == "not_found"
    assert error_of(server.get("/docs"), 404)["code"] == "not_found"
    refused = server.get("/v1/completions")
    assert error_of(refused, 405)["code"] == "method_not_allowed"
    assert refused.headers["allow"] == "POST"
    assert error_of(server.post("/health", {}), 405)["code"] == "method_not_allowed"


class TestBodyLimit:
    def test_an_announced_body_is_not_even_read(self, serve):
        server = serve(limits=Limits(body_bytes=1000))
        answer = server.post("/v1/completions", {"prompt": "x" * 2000})
        assert error_of(answer, 413)["code"] == "body_too_large"
        assert "1,000 bytes" in answer.json()["error"]["message"]
        assert answer.headers["connection"] == "close"

    def test_nor_one_that_does_not_say_how_long_it_is(self, serve):
        server = serve(limits=Limits(body_bytes=1000))

        def chunks():
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"x" * 100
            yield b'"}'

        answer = server.post("/v1/completions", content=chunks(), headers=JSON)
        assert error_of(answer, 413)["code"] == "body_too_large"
        assert not server.engine.asked

    def test_one_that_fits_is_read(self, serve):
        server = serve(limits=Limits(body_bytes=1000))
        body = json.dumps({"prompt": "x" * 400}).encode()
        assert server.post("/v1/completions", content=body, headers=JSON).status_code == 200
        body = json.dumps({"prompt": "x"}).encode().ljust(1000)
        assert server.post("/v1/completions", content=body, headers=JSON).status_code == 200

    def test_sixteen_mebibytes_by_default(self):
        assert Limits().body_bytes == 16 * 1024 * 1024


class TestContext:
    def test_overflow_is_refused_with_the_counts(self, server):
        body = {"prompt": [1] * 500, "max_tokens": 13}
        error = error_of(server.post("/v1/completions", body), 400)
        assert error["code"] == "context_length_exceeded"
        assert (error["prompt_tokens"], error["max_tokens"], error["max_model_len"]) == (500, 13, 512)
        assert error["param"] == "prompt"
        assert not server.engine.asked
        assert server.post("/v1/completions", {"prompt": [1] * 500, "max_tokens": 12}).status_code == 200

    def test_a_stream_is_refused_before_it_begins(self, server):
        body = {"messages": [{"role": "user", "content": "x" * 600}], "stream": True}
        error = error_of(server.post("/v1/chat/completions", body), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"

    def test_without_max_tokens_one_must_fit(self, server):
        content = "x" * (512 - len("<user>\n<assistant>"))
        body = {"messages": [{"role": "user", "content": content}]}
        assert error_of(server.post("/v1/chat/completions", body), 400)["prompt_tokens"] == 512
        body["messages"][0]["content"] = content[1:]
        assert server.post("/v1/chat/completions", body).status_code == 200

    def test_the_engines_own_refusal_has_the_same_shape(self, serve):
        engine = FakeEngine()
        engine.raise_at_stream = ContextLengthExceededError(5, 6, 7)
        server = serve(engine)
        for stream in (False, True):
            error = error_of(server.post("/v1/completions", {"prompt": "x", "stream": stream}), 400)
            assert (error["code"], error["max_model_len"]) == ("context_length_exceeded", 7)


class TestFailures:
    def test_one_request_fails_and_no_other(self, serve):
        server = serve(FakeEngine(fail_after=3))
        error = error_of(server.post("/v1/completions", {"prompt": "x", "temperature": 0}), 500)
        assert error["code"] == "generation_failed"
        assert error["type"] == "server_error"
        assert "ran out of something" in error["message"]
        server.engine.fail_after = None
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 200

    def test_after_the_first_byte_it_is_an_event(self, serve):
        server = serve(FakeEngine(fail_after=3))
        answer = server.post("/v1/completions", {"prompt": "x", "temperature": 0, "stream": True})
        assert answer.status_code == 200
        *_, error, done = [frame for frame in answer.text.split("\n\n") if frame]
        assert done == "data: [DONE]"
        assert json.loads(error[6:])["error"]["code"] == "generation_failed"
        stream = server.client().completions.create(model="fake", prompt="x", temperature=0, stream=True)
        with pytest.raises(openai.APIError, match="ran out of something"):
            list(stream)

    def test_before_the_first_byte_it_is_a_status(self, serve):
        server = serve(FakeEngine(fail_after=0))
        answer = server.post("/v1/completions", {"prompt": "x", "stream": True})
        assert error_of(answer, 500)["code"] == "generation_failed"

    def test_one_choice_that_fails_ends_the_others(self, serve):
        engine = FakeEngine(slots=4, token_seconds=0.02)
        engine.script = lambda prompt, params: [100] * 500 if params.seed == 1 else []
        server = serve(engine)
        answer = server.post("/v1/completions", {"prompt": "x", "n": 3, "seed": 1, "max_tokens": 400})
        error_of(answer, 500)
        assert len(engine.cancelled) >= 1

    def test_a_bug_is_told_to_the_log_and_not_to_the_client(self, serve, caplog):
        engine = FakeEngine()
        engine.raise_at_stream = RuntimeError("the secret of the bug")
        server = serve(engine)
        with caplog.at_level(logging.INFO, "kvjax.serve"):
            answer = server.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Id": "abc"})
        error = error_of(answer, 500)
        assert error["code"] == "internal_error"
        assert "abc" in error["message"]
        assert "secret" not in answer.text
        assert any("abc" in r.getMessage() and r.exc_info for r in caplog.records)

    def test_a_dead_engine_is_unavailable(self, serve):
        engine = FakeEngine()
        engine.raise_at_stream = EngineDeadError("gone")
        answer = serve(engine).post("/v1/completions", {"prompt": "x"})
        assert error_of(answer, 503)["code"] == "engine_dead"


class TestOpenaiClient:
    """Each failure arrives as the class that openai-python's users catch."""

    def test_bad_request(self, server):
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().completions.create(model="fake", prompt="x", n=99)
        assert caught.value.param == "n"

    def test_not_found(self, server):
        with pytest.raises(openai.NotFoundError) as caught:
            server.client().completions.create(model="gpt-9", prompt="x")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            server.client().models.retrieve("gpt-9")

    def test_authentication(self, serve):
        server = serve(api_keys=["right"])
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key="wrong").completions.create(model="fake", prompt="x")
        assert caught.value.code == "invalid_api_key"
        assert server.client(api_key="right").models.list().data[0].id == "fake"

    def test_overload(self, serve):
        server = serve(FakeEngine(slots=1, queue=0), max_queued=1)
        with server.engine.reserve(), pytest.raises(openai.InternalServerError) as caught:
            server.client().completions.create(model="fake", prompt="x")
        assert caught.value.status_code == 503
        assert caught.value.code == "overloaded"

    def test_a_failure_of_the_engine(self, serve):
        with pytest.raises(openai.InternalServerError):
            serve(FakeEngine(fail_after=0)).client().completions.create(model="fake", prompt="x")

    def test_a_connection_that_is_refused(self, serve):
        server = serve()
        nowhere = openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0)
        with nowhere, pytest.raises(openai.APIConnectionError):
            nowhere.models.list()
        assert server.client().models.retrieve("fake").id == "fake"

    def test_too_slow(self, serve):
        server = serve(FakeEngine(prefill_seconds=5))
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).completions.create(model="fake", prompt="x")
