"""Request bodies, strict about types and bounds and tolerant of unknown fields. The OpenAPI document is
made of these models, so every bound that can be said in a schema is said here and not in a route.

What would change the answer and is not there is refused by name; it is never silently ignored.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvjax.engine.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    Constraint,
    SamplingParams,
)
from kvjax.serve.errors import ApiError
from kvjax.serve.fields import (
    ChoiceCount,
    Integrals,
    LogprobCount,
    ModelName,
    Natural,
    Nothing,
    Positive,
    Seed,
    StopString,
    TextOnly,
    TokenBudget,
    TokenId,
    TopK,
    together,
    unsupported,
)
from kvjax.serve.limits import MAX_CHOICES, MAX_GRAMMAR, MAX_PROMPTS, MAX_TOOLS


def only_if(field: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a field that wants another one: both map one name to a schema."""
    return {
        "if": {"properties": field, "required": list(field)},
        "then": {"properties": other, "required": list(other)},
    }


def _add_rules(document: dict[str, Any], model: type[Any]) -> None:
    if model.rules:
        document["allOf"] = list(model.rules)


# the names of fields one version ago; hidden, and gone with the next
FORMER_FIELDS = {"return_kept": "return_retained", "select_after": "compress_after"}


class Body(BaseModel):
    """Strict types; unknown fields are kept, to be warned about.

    `rules` say in JSON Schema what the validators below check between fields.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), json_schema_extra=_add_rules)
    rules: ClassVar[tuple[dict[str, Any], ...]] = ()

    def unknown(self) -> list[str]:
        return list(self.model_extra or {})


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Send a last event with the usage of the request.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage so far with every event.")


Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)]


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Every answer follows its schema, whatever this says.")


class ResponseFormat(Body):
    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        unsupported("choose text, json_object or json_schema", ("text", "json_object", "json_schema")),
    ]
    json_schema: JsonSchemaFormat | None = None

    rules: ClassVar = (only_if({"type": {"const": "json_schema"}}, {"json_schema": {"type": "object"}}),)

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise together("json_schema", "type 'json_schema' wants one beside it")
        return self

    def grammar(self) -> Constraint | None:
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return Constraint("json", json.dumps(ANY_OBJECT if schema is None else schema))


class StructuredOutputs(Body):
    """One of the grammars that an answer can follow."""

    json_: Grammar | dict[str, Any] | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = Field(None, description="Lark, or GBNF.")
    json_object: bool | None = None


ANY_OBJECT = {"type": "object"}


class GenerationRequest(Body):
    """What completions and chat have in common. The names and defaults are OpenAI's, then vLLM's."""

    rules: ClassVar = (only_if({"stream_options": {"type": "object"}}, {"stream": {"const": True}}),)

    model: ModelName | None = Field(None, description="A served name; the first one if left out.")
    n: ChoiceCount | None = Field(None, description="Choices for each prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS), Integrals] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: TopK | None = Field(None, description="0 or -1 keeps all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = Field(None, description="Token id to what is added to its logit.")
    ignore_eos: bool | None = None
    min_tokens: Natural | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Requests share cached prefixes only with those of the same salt."
    )
    return_retained: bool | None = Field(
        None,
        description="Tell with each choice, as `kvjax.retained`, what share of its prompt each layer's view keeps.",
    )
    compress_after: Positive | None = Field(
        None,
        description="Choose what the views keep after so many tokens of the prompt, at most all of them; the others "
        "are read through the views, as if they came later. Not beside `echo` with `logprobs`.",
    )
    token_budget: TokenBudget | None = Field(
        None,
        description="Keep and read as a server of this `--token-budget` would: at most the server's, and as little as "
        "its method takes.",
    )
    bad_words: Annotated[list[str], Field(max_length=MAX_BAD_WORDS)] | None = Field(
        None, description="Texts that are not written."
    )
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1), Integrals] | None = Field(
        None, description="The only tokens that may be drawn."
    )
    response_format: ResponseFormat | None = Field(None, description="Text, JSON, or JSON of a schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="A grammar of the answer, as vLLM has it.")
    regex: Grammar | None = Field(
        None, description="The answer matches it. SGLang's name for structured_outputs.regex."
    )
    json_schema: Grammar | dict[str, Any] | None = Field(None, description="SGLang's, for structured_outputs.json.")
    ebnf: Grammar | None = Field(None, description="SGLang's, for structured_outputs.grammar.")
    guided_json: Grammar | dict[str, Any] | None = Field(None, description="The older name of structured_outputs.json.")
    guided_regex: Grammar | None = Field(None, description="The older name of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="The older name of structured_outputs.choice.")
    guided_grammar: Grammar | None = Field(None, description="The older name of structured_outputs.grammar.")
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None

    prompt_logprobs: Nothing = None
    truncate_prompt_tokens: Annotated[None, unsupported("prompts are never clipped; shorten it before sending")] = None
    use_beam_search: Annotated[Literal[False] | None, unsupported("sample instead", (None, False))] = None

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, data: Any) -> Any:
        """Takes the former name of a field for one version more; not beside the new one."""
        if isinstance(data, dict):
            for former, name in FORMER_FIELDS.items():
                if former in data and name not in data:
                    data = {**data, name: data[former]}
                    del data[former]
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise together("stream_options", "only with stream=true")
        return self

    def grammars(self) -> dict[str, Constraint]:
        """The grammars that the request names, by the field that does."""
        own = self.structured_outputs or StructuredOutputs()
        schemas = {
            "structured_outputs.json": own.json_,
            "json_schema": self.json_schema,
            "guided_json": self.guided_json,
        }
        texts = {
            "structured_outputs.regex": ("regex", own.regex),
            "regex": ("regex", self.regex),
            "guided_regex": ("regex", self.guided_regex),
            "structured_outputs.grammar": ("grammar", own.grammar),
            "ebnf": ("grammar", self.ebnf),
            "guided_grammar": ("grammar", self.guided_grammar),
        }
        choices = {"structured_outputs.choice": own.choice, "guided_choice": self.guided_choice}
        given = {
            **{
                name: Constraint("json", schema if isinstance(schema, str) else json.dumps(schema))
                for name, schema in schemas.items()
                if schema is not None
            },
            **{name: Constraint(kind, text) for name, (kind, text) in texts.items() if text is not None},
            **{name: Constraint("choice", json.dumps(texts)) for name, texts in choices.items() if texts is not None},
        }
        if own.json_object:
            given["structured_outputs.json_object"] = Constraint("json", json.dumps(ANY_OBJECT))
        if self.response_format is not None and (constraint := self.response_format.grammar()) is not None:
            given["response_format"] = constraint
        return given

    @model_validator(mode="after")
    def _check_grammars(self) -> "GenerationRequest":
        names = list(self.grammars())
        if len(names) > 1:
            raise together(names[1].partition(".")[0], f"{names[0]} is a grammar of the answer already; send one")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """The grammar of the answer; None if it is free."""
        return next(iter(self.grammars().values()), None)

    @property
    def choices(self) -> int:
        return self.n or 1

    def max_generated(self) -> int | None:
        """Most tokens to generate, None for as many as fit."""
        raise NotImplementedError

    def generated_logprobs(self) -> int | None:
        """Alternatives to report for each generated token, None for no log-probabilities."""
        raise NotImplementedError

    def sampling(
        self,
        index: int,
        *,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        defaults: Mapping[str, float] | None = None,
    ) -> SamplingParams:
        """Parameters of a prompt's `index`-th choice.

        Args:
            constraint: the grammar of the answer, if it is not the one that the request names.
            defaults: values of fields that the request leaves out.

        Raises:
            ApiError: 400 for what they refuse together.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "top_k": self.top_k,
        }
        given = dict(defaults or {}) | {name: value for name, value in given.items() if value is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingParams(
                **(given | {"top_k": max(int(given.get("top_k", 0)), 0)}),
                max_tokens=self.max_generated(),
                logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
                seed=choice_seed(self.seed, index),
                stop=stop,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                logprobs=self.generated_logprobs(),
                prompt_logprobs=prompt_logprobs,
                compress_after=self.compress_after,
                retained=bool(self.return_retained),
                token_budget=self.token_budget,
                constraint=self.constraint if constraint is None else constraint,
                allowed_token_ids=tuple(self.allowed_token_ids or ()),
                bad_words=tuple(self.bad_words or ()),
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition("=")[0]) from error


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's `index`-th choice: the request's own for the first, then a hash of both."""
    if seed is None or index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _prompt_form(value: object) -> str | None:
    """Which of the four forms a prompt has, by its first item; an empty list is none of them."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return "texts"
    return "token lists" if isinstance(value[0], list) else "tokens"


PromptText = Annotated[str, Field(min_length=1)]
PromptTokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Integrals]
Prompt = Annotated[
    Annotated[PromptText, Tag("text")]
    | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
    | Annotated[PromptTokens, Tag("tokens")]
    | Annotated[list[PromptTokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("token lists")],
    Discriminator(
        _prompt_form,
        custom_error_type="prompt",
        custom_error_message="a prompt is a string, a list of strings, a list of token ids or a list of "
        "lists of token ids, and none of them is empty",
    ),
]


_RANKED = {
    "anyOf": [
        {"properties": {"best_of": {"type": "null"}}},
        {"properties": {"best_of": {"const": 1}, "n": {"type": "null"}}},
        *(
            {"properties": {"best_of": {"const": n}, "n": {"const": n}}, "required": ["n"]}
            for n in range(1, MAX_CHOICES + 1)
        ),
    ]
}


class CompletionRequest(GenerationRequest):
    rules: ClassVar = (*GenerationRequest.rules, _RANKED)

    prompt: Prompt
    max_tokens: Natural | None = Field(None, description="16 if left out; 0 only scores the prompt.")
    echo: bool | None = Field(None, description="Begin the text, and the log-probabilities, with the prompt.")
    logprobs: LogprobCount | None = Field(None, description="Alternatives to report for each token.")
    best_of: ChoiceCount | None = Field(None, description="Nothing else than `n`.")
    add_special_tokens: bool | None = Field(None, description="As the tokenizer does: true if left out.")
    suffix: Annotated[Literal[""] | None, unsupported("this server does not fill in", (None, ""))] = None
    prompt_embeds: Nothing = None

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.choices:
            raise together("best_of", f"{self.best_of} is not n ({self.choices}); completions are not ranked")
        return self

    @model_validator(mode="after")
    def _check_scored(self) -> "CompletionRequest":
        if self.compress_after is not None and self.echo and self.logprobs is not None:
            reason = "log-probabilities of a prompt are those of the whole; leave it out, or echo or logprobs"
            raise together("compress_after", reason)
        return self

    def max_generated(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def generated_logprobs(self) -> int | None:
        return self.logprobs


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
    Field(json_schema_extra={"propertyNames": {"not": {"enum": sorted(RESERVED_VARIABLES)}}}),
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


class TokenizeRequest(Body):
    """Either `prompt` or `messages`."""

    rules: ClassVar = (
        {
            "oneOf": [
                {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
                {"properties": {"messages": {"type": "array"}}, "required": ["messages"]},
            ]
        },
    )

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="For a prompt: true if left out.")
    add_generation_prompt: bool | None = Field(None, description="For messages: true if left out.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise together("prompt", "send either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True), Integrals]
