"""Tools, grammars and thoughts: what a model writes of them, as the clients of OpenAI's API get it."""

import itertools
import json
import random

import pytest
from fake_engine import EOS, FakeEngine

from kvjax.serve.output.message import MessageReader, joined
from kvjax.serve.output.reasoning import ReasoningParser
from kvjax.serve.output.tool_calls import HERMES, JSON, MISTRAL, ToolCallParser, format_of
from kvjax.serve.replies import ChatCompletion, ChatCompletionChunk

USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def writing(text: str) -> FakeEngine:
    engine = FakeEngine(max_model_len=4096, script=lambda prompt, params: [*text.encode(), EOS])
    engine.tokenizer.roles = ("system", "user", "assistant", "tool")
    return engine


def parsed(parser: ToolCallParser, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    reader = MessageReader(tools=parser)
    message = joined([reader.push(part, last=False) for part in parts] + [reader.push("", last=True)])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return message["content"] or "", calls


TEXTS = [
    (HERMES, f"Let me see.\n{CALL}", "Let me see.\n", [("weather", '{"city": "Ulm"}')]),
    (HERMES, f"{CALL}\n{CALL}", "", [("weather", '{"city": "Ulm"}')] * 2),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": "}</tool_call>"}}</tool_call>', "",
     [("time", '{"a": "}</tool_call>"}')]),
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": "cut', "", [("time", '{"a": "cut')]),
    (HERMES, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', []),
    (HERMES, "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    (JSON, '{"name": "time", "parameters": {}}; {"name": "weather", "parameters": {"city": "é"}}', "",
     [("time", "{}"), ("weather", '{"city": "é"}')]),
    (JSON, ' [{"name": "time", "arguments": {}}, {"name": "time", "arguments": {"x": [1, {"y": 2}]}}]', "",
     [("time", "{}"), ("time", '{"x": [1, {"y": 2}]}')]),
    (JSON, '{"answer": 42}', '{"answer": 42}', []),
    (JSON, 'Say {"name": "time"}', 'Say {"name": "time"}', []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "time", "arguments": {}}]', "", [("time", "{}")]),
    (MISTRAL, "[TOOL] [", "[TOOL] [", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), TEXTS)
def test_calls_are_read_however_the_text_is_cut(form, text, content, calls):
    cuts = [[text], list(text)]
    for seed in range(20):
        draw, rest = random.Random(seed), text
        cuts.append([])
        while rest:
            size = draw.randint(1, 7)
            cuts[-1].append(rest[:size])
            rest = rest[size:]
    for parts in cuts:
        assert parsed(ToolCallParser(form, ["time", "weather"]), parts) == (content, calls)


def test_arguments_grow_as_they_are_written():
    reader = MessageReader(tools=ToolCallParser(HERMES, ["weather"]))
    deltas = [reader.push(character, last=False) for character in CALL]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert parts[0]["function"]["name"] == "weather"
    assert all("id" not in part for part in parts[1:])
    assert len(parts) > 10
    assert "".join(part["function"]["arguments"] for part in parts) == '{"city": "Ulm"}'


def test_one_call_where_several_are_not_wanted():
    assert len(parsed(ToolCallParser(HERMES, ["weather"], parallel=False), [f"{CALL}\n{CALL}"])[1]) == 1


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, HERMES),
        ("plain", HERMES),
        ("tools <tool_call>", HERMES),
        ("tools [TOOL_CALLS]", MISTRAL),
        ("tools {{", JSON),
    ],
)
def test_the_format_is_that_of_the_template(template, form):
    assert format_of(template) is form


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_through_the_server(serve, stream):
    server = serve(writing(f"One moment.{CALL}"))
    body = {"model": "fake", "messages": USER, "tools": [WEATHER, TIME], "temperature": 0}
    client = server.client()
    if stream:
        text, arguments, names, reasons = "", "", [], []
        for chunk in client.chat.completions.create(**body, stream=True):
            ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True))
            [choice] = chunk.choices
            text += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments
            reasons += [choice.finish_reason] if choice.finish_reason else []
        assert (text, names, reasons) == ("One moment.", ["weather"], ["tool_calls"])
    else:
        answer = client.chat.completions.create(**body)
        ChatCompletion.model_validate(answer.model_dump(exclude_unset=True))
        [choice] = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("One moment.", "tool_calls")
        [call] = choice.message.tool_calls
        assert call.id.startswith("call_")
        arguments = call.function.arguments
    assert json.loads(arguments) == {"city": "Ulm"}
    prompt = server.engine.tokenizer.decode(server.engine.asked[0][0])
    assert "The weather of a place." in prompt  # of a template that has no place for tools


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_and_a_named_call_have_a_grammar(serve, stream):
    server = serve(writing('[{"name": "time", "arguments": {}}]'))
    body = {"messages": USER, "tools": [WEATHER, TIME], "temperature": 0, "tool_choice": "required"}
    assert server.post("/v1/chat/completions", body | {"stream": stream}).status_code == 200
    schema = json.loads(server.engine.asked[0][1].constraint.source)
    assert [each["properties"]["name"]["const"] for each in schema["items"]["anyOf"]] == ["weather", "time"]
    assert schema["maxItems"] > 1
    server.post("/v1/chat/completions", body | {"parallel_tool_calls": False})
    assert json.loads(server.engine.asked[1][1].constraint.source)["maxItems"] == 1

    server = serve(writing('{"city": "Ulm"}'))
    body |= {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]
    [call] = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert json.loads(server.engine.asked[0][1].constraint.source) == WEATHER["function"]["parameters"]


def test_none_offers_no_tools(serve):
    server = serve(writing(CALL))
    answer = server.post("/v1/chat/completions", {"messages": USER, "tools": [WEATHER], "tool_choice": "none"})
    assert answer.json()["choices"][0]["message"]["content"] == CALL
    assert "weather of" not in server.engine.tokenizer.decode(server.engine.asked[0][0])


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "required", "regex": "a"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice"),
        ({"regex": "a", "ebnf": "b"}, "ebnf"),
        ({"regex": "a", "structured_outputs": {"json": {}}}, "regex"),
    ],
)
def test_what_contradicts_is_refused(server, extra, param):
    answer = server.post("/v1/chat/completions", {"messages": USER} | extra)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


HISTORY = [
    {"role": "user", "content": "weather in Ulm?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": ""}},
    ]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
    {"role": "user", "content": []},
    {"role": "user", "name": "eve", "content": "and?"},
    {"role": "assistant", "content": ""},
    {"role": "assistant"},
]  # fmt: skip


def test_histories_of_agents_for_a_template_that_knows_them(serve):
    server = serve(writing("ok"))
    server.engine.tokenizer.template = "tools tool_calls tool <tool_call>"
    assert server.post("/v1/chat/completions", {"messages": HISTORY, "tools": [WEATHER]}).status_code == 200
    rendered = server.engine.tokenizer.rendered
    assert rendered["tools"] == [WEATHER]
    calls = rendered["messages"][1]["tool_calls"]
    assert calls[0]["function"] == {"name": "weather", "arguments": {"city": "Ulm"}}
    assert calls[1]["function"]["arguments"] == {}
    assert [message["role"] for message in rendered["messages"]] == [message["role"] for message in HISTORY]
    assert rendered["messages"][3]["content"] == "noon"
    assert rendered["messages"][5]["name"] == "eve"
    assert rendered["messages"][7]["content"] == ""


def test_histories_of_agents_for_a_template_that_does_not(serve):
    server = serve(writing("ok"))
    server.engine.tokenizer.roles = ("user", "assistant")
    assert server.post("/v1/chat/completions", {"messages": HISTORY}).status_code == 200
    prompt = server.engine.tokenizer.decode(server.engine.asked[0][0])
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>' in prompt
    assert "<user><tool_response>\nrain\n</tool_response>" in prompt
    assert "None" not in prompt


def test_roles_in_a_row_for_a_template_that_wants_them_in_turn(serve):
    server = serve(writing("ok"))
    render = server.engine.tokenizer.render

    def alternating(messages, **options):
        roles = [message["role"] for message in messages]
        if any(one == other for one, other in itertools.pairwise(roles)):
            raise ValueError("conversation roles must alternate")
        return render(messages, **options)

    server.engine.tokenizer.render = alternating
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert server.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    assert "one\n\ntwo" in server.engine.tokenizer.decode(server.engine.asked[0][0])


@pytest.mark.parametrize(
    ("thinking", "text", "thought", "answer"),
    [
        (False, "<think>\nhm\n</think>\n\nyes", "\nhm\n", "yes"),
        (True, "hm</think>yes", "hm", "yes"),
        (True, "cut", "cut", ""),
        (False, "no thought", "", "no thought"),
        (False, "<thin", "", "<thin"),
        (False, "\n<think></think>x", "", "x"),
    ],
)
def test_thoughts_are_told_apart(thinking, text, thought, answer):
    for size in (1, 3, 100):
        parser, read = ReasoningParser(thinking), ("", "")
        for begin in range(0, len(text), size):
            read = tuple(a + b for a, b in zip(read, parser.push(text[begin : begin + size]), strict=True))
        read = tuple(a + b for a, b in zip(read, parser.push("", last=True), strict=True))
        assert read == (thought, answer)


def test_a_model_that_thinks(serve):
    server = serve(writing("<think>hm</think>yes"))
    server.engine.tokenizer.template = "splits at </think>"
    message = server.post("/v1/chat/completions", {"messages": USER}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "yes")


def test_variables_of_the_template(serve):
    server = serve(writing("ok"))
    body = {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.engine.tokenizer.rendered["variables"] == {"enable_thinking": False, "reasoning_effort": "low"}


def test_the_last_message_is_continued(serve):
    server = serve(writing("ok"))
    body = {"messages": [*USER, {"role": "assistant", "content": "The an"}], "continue_final_message": True}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.asked[0][0]).endswith("The an")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("field", "value", "kind", "source"),
    [
        ("response_format", {"type": "json_object"}, "json", '{"type": "object"}'),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "json", SCHEMA),
        ("structured_outputs", {"json": SCHEMA}, "json", SCHEMA),
        ("structured_outputs", {"json": json.dumps(SCHEMA)}, "json", SCHEMA),
        ("structured_outputs", {"regex": "a+"}, "regex", "a+"),
        ("structured_outputs", {"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ("structured_outputs", {"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ("structured_outputs", {"json_object": True}, "json", '{"type": "object"}'),
        ("guided_json", SCHEMA, "json", SCHEMA),
        ("guided_regex", "a", "regex", "a"),
        ("guided_choice", ["a"], "choice", '["a"]'),
        ("guided_grammar", "g", "grammar", "g"),
        ("regex", "a", "regex", "a"),
        ("json_schema", SCHEMA, "json", SCHEMA),
        ("ebnf", "g", "grammar", "g"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_grammars_reach_the_engine(server, field, value, kind, source, path):
    body = {"messages": USER} if "chat" in path else {"prompt": "x"}
    assert server.post(path, body | {field: value}).status_code == 200
    constraint = server.engine.asked[-1][1].constraint
    assert constraint.kind == kind
    assert constraint.source == source if isinstance(source, str) else json.loads(constraint.source) == source


def test_tokens_and_words_reach_the_engine(server):
    body = {"prompt": "x", "allowed_token_ids": [1, 2.0], "bad_words": ["no"]}
    assert server.post("/v1/completions", body).status_code == 200
    params = server.engine.asked[-1][1]
    assert (params.allowed_token_ids, params.bad_words) == ((1, 2), ("no",))


def test_defaults_of_the_publisher(serve):
    server = serve(FakeEngine(), defaults={"temperature": 0.25, "top_k": 7})
    server.post("/v1/completions", {"prompt": "x"})
    server.post("/v1/completions", {"prompt": "x", "temperature": 1.5})
    assert [(params.temperature, params.top_k) for _, params, *_ in server.engine.asked] == [(0.25, 7), (1.5, 7)]
