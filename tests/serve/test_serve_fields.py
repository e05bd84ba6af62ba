"""Every field that the clients of three servers may send: served, refused with a reason, or harmless; none ignored."""

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat

from kvjax.serve.chat_schema import ChatCompletionRequest
from kvjax.serve.refused_fields import HARMLESS, REFUSED
from kvjax.serve.schema import CompletionRequest

OPENAI = {
    "/v1/chat/completions": set(chat.CompletionCreateParamsBase.__annotations__),
    "/v1/completions": set(completions.CompletionCreateParamsBase.__annotations__),
}
# the protocols of vLLM 0.11 and SGLang 0.5, without what OpenAI's have
VLLM = {
    *("use_beam_search", "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens"),
    *("truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids", "bad_words", "add_special_tokens"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("priority", "request_id", "logits_processors", "return_tokens_as_token_ids", "return_token_ids", "cache_salt"),
    *("kv_transfer_params", "vllm_xargs"),
}
VLLM_CHAT = {
    *("add_generation_prompt", "continue_final_message", "documents", "chat_template", "chat_template_kwargs"),
    *("mm_processor_kwargs", "include_reasoning", "echo"),
}
SGLANG = {
    *("regex", "ebnf", "json_schema", "no_stop_trim", "stop_regex", "lora_path", "session_params", "custom_params"),
    *("custom_logit_processor", "return_hidden_states", "rid"),
}
SGLANG_CHAT = {"separate_reasoning", "stream_reasoning", "input_ids"}
MODELS = {"/v1/chat/completions": ChatCompletionRequest, "/v1/completions": CompletionRequest}
EVERY = [
    (path, name)
    for path in MODELS
    for name in sorted(OPENAI[path] | VLLM | SGLANG | (VLLM_CHAT | SGLANG_CHAT if "chat" in path else set()))
]


@pytest.mark.parametrize(("path", "name"), EVERY)
def test_every_field_is_served_refused_or_harmless(path, name):
    kinds = [name in MODELS[path].model_fields, name in REFUSED, name in HARMLESS]
    assert sum(kinds) == 1, f"{name} is of {sum(kinds)} kinds"


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("path", MODELS)
def test_what_is_refused_has_a_reason_and_neutral_values_pass(server, name, path):
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    answer = server.post(path, body | {name: "something else"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == name
    assert len(error["message"]) > len(name) + 10
    for neutral in (None, *REFUSED[name][0]):
        assert server.post(path, body | {name: neutral}).status_code == 200


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_causes_no_warning(server, name, caplog):
    assert server.post("/v1/completions", {"prompt": "hi", name: "x"}).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
