"""A server as a target: what is sent, what is made of what comes back, and what is said when nothing does."""

import asyncio

import pytest

from kvjax.eval.targets import TargetError, TargetFailedError, TargetGoneError, TargetRequest
from kvjax.eval.targets import openai as target_openai
from kvjax.eval.targets.openai import OpenAITarget
from tests.end_to_end.server_process import MODEL
from tests.eval.openai_server import MODELS, serving, stream, text

USAGE = {**text(""), "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(target_openai, "RETRIES", 0)


class Script:
    """What a server says to each path, and what it heard."""

    def __init__(self, **replies):
        self.replies = {"models": (200, MODELS), "tokenize": (200, {"count": 5})} | replies
        self.heard = []

    def __call__(self, path, body, headers):
        name = path.removeprefix("/v1").strip("/").replace("/", "_")
        self.heard.append((path, body, headers))
        return self.replies.get(name, (404, {"error": {"message": f"no {path}"}}))


def ask(target, prompt="Once", **options):
    async def one():
        async with target.session():
            return await target.complete(TargetRequest(prompt, max_tokens=4, **options))

    try:
        return asyncio.run(one())
    finally:
        target.close()


def test_an_answer_is_joined_with_its_usage():
    script = Script(completions=(200, stream(text(" a"), text(" b", "length"), USAGE)))
    with serving(script) as url:
        answer = ask(OpenAITarget(url, api_key="sk-1"), temperature=0.0, seed=3)
    assert (answer.text, answer.finish, answer.prompt_tokens, answer.tokens) == (" a b", "length", 7, 2)
    assert 0 < answer.first_token_seconds <= answer.seconds
    path, body, headers = script.heard[-1]
    assert path == "/v1/completions"
    assert body["prompt"] == "Once"
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("m", 4, 0.0, 3)
    assert headers["authorization"] == "Bearer sk-1"


def test_a_server_cannot_be_kept_from_the_question():
    with serving(Script()) as url, pytest.raises(TargetFailedError, match="evaluate an engine in this process"):
        ask(OpenAITarget(url), context_prefix="On")


def test_a_chat_sends_messages():
    said = {**text(""), "object": "chat.completion.chunk"}
    said["choices"] = [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]
    script = Script(chat_completions=(200, stream(said)))
    messages = [{"role": "user", "content": "Hello"}]
    with serving(script) as url:
        answer = ask(OpenAITarget(url), messages)
    assert (answer.text, answer.finish) == ("Hi", "stop")
    assert script.heard[-1][1]["messages"] == messages


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_addresses_with_and_without_v1_are_one(ending):
    script = Script(completions=(200, stream(text("a", "stop"))))
    with serving(script) as url:
        target = OpenAITarget(url + ending)
        assert target.identity == {"model": "m", "url": f"{url}/v1", "tokenizer": "/tokenize"}
        ask(target)
    assert [path for path, _, _ in script.heard] == ["/v1/models", "/tokenize", "/v1/completions"]


def test_the_context_is_the_servers_if_it_tells():
    told = {"object": "list", "data": [MODELS["data"][0] | {"max_model_len": 512}]}
    for models, length in ((MODELS, None), (told, 512)):
        with serving(Script(models=(200, models))) as url:
            target = OpenAITarget(url)
            target.close()
        assert target.max_model_len == length


def test_tokens_are_counted_by_the_server_or_here():
    script = Script()
    with serving(script) as url:
        there, here = OpenAITarget(url), OpenAITarget(url, tokenizer=str(MODEL))
        assert there.count("x") == there.count([{"role": "user", "content": "x"}]) == 5
        assert [body for path, body, _ in script.heard if path == "/tokenize"][1:] == [
            {"model": "m", "prompt": "x"},
            {"model": "m", "messages": [{"role": "user", "content": "x"}]},
        ]
        assert here.count("apple apple") == 3
        assert here.count([{"role": "user", "content": "apple apple"}]) == 6
        there.close()
        here.close()


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        ((400, {"error": {"message": "too long by 3"}}), TargetFailedError, "^too long by 3$"),
        ((503, {"error": {"message": "draining"}}), TargetFailedError, "draining"),
        ((200, stream(text("a"), {"error": {"message": "engine died"}})), TargetFailedError, "engine died"),
        ((200, stream(text("a"))), TargetFailedError, "no finish_reason"),
        ((200, stream(text("a"), done=False)), TargetGoneError, "broke in the middle"),
    ],
)
def test_half_an_answer_is_none(reply, error, words):
    with serving(Script(completions=reply)) as url, pytest.raises(error, match=words) as failure:
        ask(OpenAITarget(url))
    assert type(failure.value) is error


def test_a_server_that_left_is_gone():
    with serving(Script()) as url:
        target = OpenAITarget(url)
    with pytest.raises(TargetGoneError):
        target.count("x")
    with pytest.raises(TargetGoneError):
        ask(target)


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        (Script(tokenize=(404, {})), {}, "no /tokenize that answers .* --tokenizer FOLDER"),
        (Script(models=(401, {"error": {"message": "no"}})), {}, "wants another key: set OPENAI_API_KEY"),
        (Script(models=(404, {"error": {"message": "not here"}})), {}, "not here; check --url"),
        (Script(), {"model": "big"}, "has no model 'big'; it has m"),
        (Script(models=(200, {"object": "list", "data": []})), {}, "has no model None; it has none"),
        (Script(), {"tokenizer": "/nowhere"}, "--tokenizer: no tokenizer can be read from /nowhere"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_at_the_start(script, options, words):
    with serving(script) as url, pytest.raises(TargetError, match=words):
        OpenAITarget(url, **options)


@pytest.mark.parametrize(
    ("url", "words"), [("localhost:8000", "is no address"), ("http://127.0.0.1:9", "start the server")]
)
def test_an_address_where_nobody_is(url, words):
    with pytest.raises(TargetError, match=words):
        OpenAITarget(url)
