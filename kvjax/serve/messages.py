"""Messages of a conversation, and the tools that it may call, as OpenAI has them."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from kvjax.serve.fields import together, unsupported
from kvjax.serve.schema_base import Body


class TextPart(Body):
    type: Annotated[Literal["text"], unsupported("this server reads text; send parts of type 'text'", ("text",))]
    text: str


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: Annotated[str, Field(description="A JSON object, as text.")] = "{}"


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Annotated[Literal["function"] | None, unsupported("only functions are called", (None, "function"))] = None
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON, so they get them as values."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except ValueError:
            arguments = self.function.arguments
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call | ({"id": self.id} if self.id else {})


ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(Body):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        unsupported(f"choose {', '.join(ROLES[:-1])} or {ROLES[-1]}", ROLES),
    ]
    content: str | list[TextPart] | None = Field(None, description="May be null for an assistant only.")
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Of an assistant: what it called.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call that this answers.")
    refusal: str | None = None
    reasoning_content: str | None = Field(None, description="Of an assistant: what it thought.")
    function_call: Annotated[None, unsupported("it is of an older API; send tool_calls")] = None
    audio: Annotated[None, unsupported("this server reads text")] = None

    rules: ClassVar = (
        {
            "if": {"properties": {"role": {"enum": ["system", "developer", "user", "tool"]}}},
            "then": {
                "properties": {"content": {"type": ["string", "array"]}, "tool_calls": {"type": "null"}},
                "required": ["content"],
            },
        },
    )

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.role != "assistant":
            if self.content is None:
                raise together("content", f"a message of role {self.role!r} has text, perhaps an empty one")
            if self.tool_calls is not None:
                raise together("tool_calls", f"only an assistant calls tools, and this message's role is {self.role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template sees it: text parts joined by line ends."""
        content = self.content
        text = "\n".join(part.text for part in content) if isinstance(content, list) else content
        message: dict[str, Any] = {"role": self.role, "content": text}
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="Calls that are required follow their schema, whatever this says.")


class Tool(Body):
    type: Annotated[Literal["function"], unsupported("this server calls functions", ("function",))]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Annotated[Literal["function"], unsupported("this server calls functions", ("function",))]
    function: FunctionName
