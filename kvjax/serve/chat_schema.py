"""Body of a chat completion: a conversation, the tools that its answer may call, and how the prompt is rendered."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kvjax.serve.fields import LogprobCount, Positive, TextOnly, together, unsupported
from kvjax.serve.limits import MAX_TOOLS
from kvjax.serve.messages import Message, NamedTool, Tool
from kvjax.serve.schema import GenerationRequest
from kvjax.serve.schema_base import only_if

RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "conversation",
        "chat_template",
    }
)


def _free_variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in RESERVED_VARIABLES:
            raise PydanticCustomError("reserved", "{name} is not a variable of its own", {"name": name})
    return value


TemplateVariables = Annotated[
    dict[str, Any],
    AfterValidator(_free_variables),
    Field(json_schema_extra={"propertyNames": {"not": {"enum": [*sorted(RESERVED_VARIABLES)]}}}),
]


class ChatCompletionRequest(GenerationRequest):
    rules: ClassVar = (
        *GenerationRequest.rules,
        only_if({"top_logprobs": {"type": "integer"}}, {"logprobs": {"const": True}}),
        only_if({"continue_final_message": {"const": True}}, {"add_generation_prompt": {"enum": [False, None]}}),
    )

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = Field(None, description="As many as fit if left out.")
    max_tokens: Positive | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = Field(None, description="Only with `logprobs`.")
    add_generation_prompt: bool | None = Field(None, description="True if left out.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message instead of answering.")
    echo: Annotated[Literal[False] | None, unsupported("the answer alone is sent", (None, False))] = None
    add_special_tokens: Annotated[
        Literal[False] | None, unsupported("the chat template writes them itself", (None, False))
    ] = None
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="Further variables of the model's chat template, as enable_thinking."
    )
    reasoning_effort: str | None = Field(
        None, description="As a variable of the chat template, for those that have it."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the answer may call."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Whether a function is called: none, auto (the default), required, or the one named."
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether there may be several calls: true if left out.")
    functions: Annotated[None, unsupported("they are of an older API; send tools")] = None
    function_call: Annotated[
        Literal["none", "auto"] | None,
        unsupported("it is of an older API; send tool_choice", (None, "none", "auto")),
    ] = None
    modalities: list[TextOnly] | None = None
    audio: Annotated[None, unsupported("this server writes text")] = None
    chat_template: Annotated[None, unsupported("the operator chooses it: --chat-template")] = None

    @model_validator(mode="after")
    def _check_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise together("top_logprobs", "only with logprobs=true")
        if self.continue_final_message and self.add_generation_prompt:
            raise together("continue_final_message", "leave add_generation_prompt out, or send false")
        if self.continue_final_message and self.messages[-1].content is None:
            raise together("continue_final_message", "the last message has no text to go on with")
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice == "required" and not names:
            raise together("tool_choice", "'required' wants tools beside it")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise together("tool_choice", f"{self.tool_choice.function.name!r} is not among tools")
        if self.forced_tools and self.grammars():
            raise together("tool_choice", "the answer cannot be a call and follow another grammar; leave one out")
        return self

    @property
    def forced_tools(self) -> bool:
        """Whether the answer is a call, whatever the model would say."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The functions that the prompt describes, as JSON."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True, exclude_unset=True) for tool in self.tools or ()]

    def unknown(self) -> list[str]:
        nested = {f"messages[].{name}" for message in self.messages for name in message.unknown()}
        return [*super().unknown(), *sorted(nested)]

    def max_generated(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def generated_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
