"""Chat template: messages to the text of a prompt, in a form that the model's own template takes.

Templates differ in what they know: the role of developers, calls of tools, tools' answers, two messages of one role
in a row. What a template does not know is written in the common form (Hermes) before it sees the messages.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from kvjax.serve.chat_schema import ChatCompletionRequest
from kvjax.serve.errors import ApiError
from kvjax.serve.messages import Message
from kvjax.serve.protocol import TokenizerProtocol


def require_template(tokenizer: TokenizerProtocol) -> None:
    """Raises ApiError (400) for a model that has no chat template."""
    if not tokenizer.has_chat_template:
        raise ApiError(
            400,
            "this model has no chat template: use /v1/completions, or start the server with --chat-template",
            param="messages",
            code="no_chat_template",
        )


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A conversation and how it is rendered.

    Attributes:
        generation_prompt: whether the beginning of an answer is written behind the messages.
        continued: whether the last message is left open, to be gone on with.
        variables: further variables of the template.
        tools: descriptions of functions, as OpenAI's `tools`.
    """

    messages: Sequence[Message]
    generation_prompt: bool = True
    continued: bool = False
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    tools: Sequence[dict[str, Any]] = ()

    @classmethod
    def of(cls, body: ChatCompletionRequest) -> "ChatPrompt":
        """The prompt of a request."""
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        continued = bool(body.continue_final_message)
        generation_prompt = body.add_generation_prompt is not False and not continued
        return cls(body.messages, generation_prompt, continued, variables, body.offered_tools)

    def render(self, tokenizer: TokenizerProtocol) -> str:
        """The text of the prompt. Raises ApiError (400) in the template's words if it refuses."""
        template = tokenizer.chat_template or ""
        rendered = [message.for_template() for message in self.messages]
        native = "tools" in template
        if self.tools and not native:
            rendered = [{"role": "system", "content": _described(self.tools)}, *rendered]
        rendered = [_known(message, template) for message in rendered]
        options = {
            "add_generation_prompt": self.generation_prompt,
            "continue_final_message": self.continued,
            "variables": self.variables,
            "tools": list(self.tools) if self.tools and native else None,
        }
        try:
            return tokenizer.render(rendered, **options)
        except (ValueError, TypeError) as error:
            merged = _merged(rendered)
            if len(merged) < len(rendered):  # the reason may be two messages of one role in a row
                try:
                    return tokenizer.render(merged, **options)
                except (ValueError, TypeError):
                    pass  # the reason is another: the one of the messages as they came
            raise ApiError(400, f"messages: {error}"[:500], param="messages") from error

    def tokens(self, tokenizer: TokenizerProtocol) -> list[int]:
        """Token ids of the prompt; the template writes the special tokens itself. Slow."""
        return tokenizer.encode(self.render(tokenizer), add_special_tokens=False)

    @property
    def characters(self) -> int:
        """Characters of the messages, about: what decides how long rendering takes."""
        return sum(len(str(message.content)) for message in self.messages)


def _known(message: dict[str, Any], template: str) -> dict[str, Any]:
    """The message in words that the template knows; one that does not would write a role or None as it stands."""
    role, content = message["role"], message["content"]
    if role == "developer" and "developer" not in template:
        return message | {"role": "system"}
    if role == "assistant" and content is None and "tool_calls" not in message:
        return message | {"content": ""}
    if "tool_calls" in message and "tool_calls" not in template:
        calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message["tool_calls"]]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return rest | {"content": "\n".join(part for part in (content, *calls) if part)}
    if role == "tool" and "tool" not in template:
        rest = {name: value for name, value in message.items() if name not in ("tool_call_id", "name")}
        return rest | {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return message


def _described(tools: Sequence[dict[str, Any]]) -> str:
    """Instructions for a model whose template has no place for tools."""
    return (
        "You may call one or more functions to assist with the user query.\n\nYou are provided with function "
        "signatures within <tools></tools> XML tags:\n<tools>\n"
        + "\n".join(json.dumps(tool) for tool in tools)
        + "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with consecutive ones of a role as one, for templates that want roles in turn."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        plain = message.keys() <= {"role", "content", "name"}
        if merged and plain and merged[-1].keys() <= {"role", "content", "name"}:
            last = merged[-1]
            if last["role"] == message["role"]:
                merged[-1] = last | {"content": f"{last['content']}\n\n{message['content']}"}
                continue
        merged.append(message)
    return merged
