"""`/v1/chat/completions`, `/tokenize` and `/detokenize`."""

import logging

import pytest
from fake_engine import BOS, REPLY, FakeEngine
from test_serve_completions import events

from kvjax.serve.replies import ChatCompletion, ChatCompletionChunk, Detokenized, Tokenized

USER = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0, "max_tokens": 32}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}


def test_an_answer(server):
    answer = server.client().chat.completions.create(model="fake", messages=USER, temperature=0)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", REPLY)
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    [(prompt, params, *_)] = server.engine.asked
    assert server.engine.tokenizer.decode(prompt) == "<user>hi\n<assistant>"
    assert params.max_tokens is None  # as many as fit


def test_a_stream_with_usage(server):
    chunks = list(
        server.client().chat.completions.create(
            model="fake", messages=USER, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == REPLY
    assert parts[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.prompt_tokens == len(server.engine.asked[0][0])


def test_the_newer_name_of_max_tokens_wins(server):
    body = {"messages": USER, "temperature": 0, "max_completion_tokens": 3, "max_tokens": 9}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == "Hel"
    assert answer["choices"][0]["finish_reason"] == "length"
    answer = server.post("/v1/chat/completions", {"messages": USER, "temperature": 0, "max_tokens": 2}).json()
    assert answer["choices"][0]["message"]["content"] == "He"


def test_choices_are_seeded_apart(server):
    create = server.client().chat.completions.create
    first, again = (create(model="fake", messages=USER, n=3, seed=1) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_text_parts_are_joined(server):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert server.engine.tokenizer.decode(server.engine.asked[0][0]) == "<user>a\nb\n<assistant>"


def test_developer_is_system_for_a_template_that_lacks_it(server):
    messages = [{"role": "developer", "content": "be brief"}, *USER]
    assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    prompt = server.engine.tokenizer.decode(server.engine.asked[0][0])
    assert prompt == "<system>be brief\n<user>hi\n<assistant>"


def test_developer_stays_for_a_template_that_has_it(server, monkeypatch):
    monkeypatch.setattr(server.engine.tokenizer, "roles", ("developer", "user"))
    monkeypatch.setattr(server.engine.tokenizer, "template", "knows the developer")
    messages = [{"role": "developer", "content": "be brief"}, *USER]
    server.post("/v1/chat/completions", {"messages": messages})
    assert server.engine.tokenizer.decode(server.engine.asked[0][0]).startswith("<developer>")


def test_a_template_that_refuses_is_the_requests_fault(server, monkeypatch):
    monkeypatch.setattr(server.engine.tokenizer, "roles", ("user",))
    messages = [{"role": "system", "content": "x"}, *USER]
    answer = server.post("/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400
    assert "refuses these messages: no role 'system'" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "messages"


def test_a_model_without_a_template_says_so(serve):
    server = serve(FakeEngine(chat_template=False))
    answer = server.post("/v1/chat/completions", {"messages": USER})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"
    assert "--chat-template" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_bytes(server, stream):
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "stream": stream} | GREEDY
    response = server.post("/v1/chat/completions", body)
    if stream:
        chunks = events(response)
        content = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.25,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.25, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    said = b"".join(bytes(entry["bytes"]) for entry in content)  # without the token that ends it
    assert said.decode() == REPLY


def test_logprobs_without_alternatives(server):
    answer = server.post("/v1/chat/completions", {"messages": USER, "logprobs": True} | GREEDY).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_the_documented_shape(server, stream):
    body = {"messages": USER, "n": 2, "logprobs": True, "top_logprobs": 3, "stream": stream} | GREEDY
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    response = server.post("/v1/chat/completions", body)
    if not stream:
        ChatCompletion.model_validate(response.json())
        return
    for event in events(response):
        ChatCompletionChunk.model_validate(event)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("response_format", {"type": "xml"}, "response_format.type"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("tools", [{"type": "retrieval"}], "tools[0].type"),
        ("tools", [{"type": "function", "function": {"name": "has spaces"}}], "tools[0].function.name"),
        ("tool_choice", "required", "tool_choice"),
        ("functions", [], "functions"),
        ("modalities", ["text", "audio"], "modalities[1]"),
        ("audio", {"voice": "x"}, "audio"),
        ("chat_template", "{{ 1 }}", "chat_template"),
        ("guided_json", 3, "guided_json"),
        ("regex", "invalid", "response_format"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs"),
        ("continue_final_message", 1, "continue_final_message"),
        ("top_logprobs", 2, "top_logprobs"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("truncate_prompt_tokens", 5, "truncate_prompt_tokens"),
        ("messages", [], "messages"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ("messages", [{"role": "wizard", "content": "x"}], "messages[0].role"),
        ("messages", [*USER, {"role": "user"}], "messages[1].content"),
        ("messages", [{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ("messages", [*USER, {"role": "user", "content": "", "tool_calls": [CALL]}], "messages[1].tool_calls"),
    ],
)
def test_what_is_not_there_is_refused_by_name(server, field, value, param):
    answer = server.post("/v1/chat/completions", {"messages": USER} | {field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not server.engine.asked


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "text"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"tools": []},
        {"parallel_tool_calls": True, "reasoning_effort": "low", "prompt_cache_key": "x", "safety_identifier": "y"},
        {"modalities": ["text"]},
        {"tool_choice": None, "functions": None, "audio": None, "logprobs": False},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}]},
    ],
)
def test_what_changes_nothing_is_accepted(server, extra):
    assert server.post("/v1/chat/completions", {"messages": USER} | GREEDY | extra).status_code == 200


def test_unknown_fields_warn_once_a_name(server, caplog):
    message = {"role": "user", "content": "hi", "mood": "secret"}
    with caplog.at_level(logging.WARNING, "kvjax.serve"):
        for _ in range(2):
            body = {"messages": [message], "frobnicate": "secret"} | GREEDY
            assert server.post("/v1/chat/completions", body).status_code == 200
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    assert "'frobnicate'" in warned[0]
    assert "'messages[].mood'" in warned[1]
    assert "secret" not in "".join(warned)


class TestTokens:
    def test_there_and_back(self, server):
        answer = server.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json()
        Tokenized.model_validate(answer)
        assert answer["tokens"] == [BOS, *"hé".encode()]
        assert answer["count"] == 4
        assert answer["max_model_len"] == 512
        assert answer["token_strs"] == ["<s>", "h", "�", "�"]
        back = server.post("/detokenize", {"tokens": answer["tokens"]}).json()
        Detokenized.model_validate(back)
        assert back == {"prompt": "<s>hé"}

    def test_a_conversation(self, server):
        answer = server.post("/tokenize", {"messages": USER, "add_generation_prompt": False}).json()
        assert server.engine.tokenizer.decode(answer["tokens"]) == "<user>hi\n"
        assert answer["token_strs"] is None

    def test_without_special_tokens(self, server):
        answer = server.post("/tokenize", {"prompt": "hi", "add_special_tokens": False}).json()
        assert answer["tokens"] == [104, 105]

    @pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": USER}])
    def test_either_a_prompt_or_messages(self, server, body):
        assert server.post("/tokenize", body).json()["error"]["param"] == "prompt"

    def test_a_token_outside_the_vocabulary(self, server):
        answer = server.post("/detokenize", {"tokens": [1, 258]})
        assert answer.status_code == 400
        assert "258 is outside [0, 257]" in answer.json()["error"]["message"]
