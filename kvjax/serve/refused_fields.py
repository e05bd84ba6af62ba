"""Fields of other servers that would change an answer and are not served, and such as change nothing.

A field of the first kind is refused, but for the values that ask for what is done anyway. `tests/serve` holds that
every field of openai-python, vLLM and SGLang is served, here, or in `HARMLESS`.
"""

from collections.abc import Mapping
from typing import Any

from kvjax.serve.fields import together

BEAM = "sample instead"
ADAPTERS = "this server has no adapters; merge one into the weights"
ALWAYS_SHOWN = "the text is always without special tokens"

# name: values that mean nothing else than leaving it out, and the way out
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "length_penalty": ((1, 1.0), BEAM),
    "early_stopping": ((False,), BEAM),
    "lora_path": ((), ADAPTERS),
    "lora_name": ((), ADAPTERS),
    "adapter": ((), ADAPTERS),
    "documents": (([],), "put them into the messages"),
    "web_search_options": ((), "this server does not search"),
    "verbosity": (("medium",), "say in the prompt how long the answer is to be"),
    "mm_processor_kwargs": (({},), "this server reads text"),
    "include_stop_str_in_output": ((False,), "the stop string is `stop_reason`"),
    "no_stop_trim": ((False,), "the stop string is `stop_reason`"),
    "stop_regex": (([],), "use `stop`, or a grammar"),
    "skip_special_tokens": ((True,), ALWAYS_SHOWN),
    "spaces_between_special_tokens": ((True, False), ALWAYS_SHOWN),
    "detokenize": ((True,), "the answer is text"),
    "include_reasoning": ((True,), "leave it out; `reasoning_content` is apart from the answer"),
    "separate_reasoning": ((True,), "leave it out; `reasoning_content` is apart from the answer"),
    "stream_reasoning": ((True,), "leave it out"),
    "thinking_token_budget": ((), "use max_tokens"),
    "logits_processors": (([],), "use a grammar, allowed_token_ids or logit_bias"),
    "custom_logit_processor": ((), "use a grammar, allowed_token_ids or logit_bias"),
    "custom_params": (({},), "use a grammar, allowed_token_ids or logit_bias"),
    "logprob_token_ids": (([],), "ask for `logprobs`"),
    "structural_tag": ((), "use a grammar or tools"),
    "repetition_detection": ((), "use a penalty"),
    "vllm_xargs": (({},), "this server has no such extension"),
    "kv_transfer_params": (({},), "this server has no such connector"),
    "return_token_ids": ((False,), "POST /tokenize tells the ids"),
    "return_tokens_as_token_ids": ((False,), "POST /tokenize tells the ids"),
    "return_hidden_states": ((False,), "this server answers with text"),
    "session_params": (({},), "send the whole conversation; what it shares with earlier ones is not computed again"),
    "input_ids": ((), "send them as the prompt of /v1/completions"),
    "priority": ((0,), "requests are served in the order in which they come"),
    "truncation_side": ((), "prompts are never clipped"),
}
HARMLESS: Mapping[str, str] = {
    "user": "a label",
    "metadata": "a label",
    "safety_identifier": "a label",
    "request_id": "send X-Request-Id",
    "rid": "send X-Request-Id",
    "store": "of OpenAI's dashboard",
    "service_tier": "of OpenAI's prices",
    "moderation": "of OpenAI's service",
    "prediction": "of speed alone",
    "prompt_cache_key": "of speed alone; what is stored is found by its content",
    "prompt_cache_retention": "of speed alone",
    "prompt_cache_options": "of speed alone",
}


def check_refused(data: Mapping[str, Any]) -> None:
    """Raises PydanticCustomError for the first field of a request that is refused."""
    for name in data.keys() & REFUSED.keys():
        neutral, way_out = REFUSED[name]
        value = data[name]
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise together(name, f"not supported here: {way_out}")
