"""Request bodies, strict about types and bounds and tolerant of unknown fields. The OpenAPI document is
made of these models, so every bound that can be said in a schema is said here and not in a route.

What would change the answer and is not there is refused by name; it is never silently ignored.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

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
    TokenBudget,
    TokenId,
    TopK,
    together,
    unsupported,
)
from kvjax.serve.grammar_fields import ANY_OBJECT, Choices, Grammar, ResponseFormat, StructuredOutputs
from kvjax.serve.limits import MAX_CHOICES, MAX_PROMPTS
from kvjax.serve.messages import Message
from kvjax.serve.refused_fields import check_refused
from kvjax.serve.schema_base import Body, only_if

# the names of fields one version ago; hidden, and gone with the next
FORMER_FIELDS = {"return_kept": "return_retained", "select_after": "compress_after"}


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="Send a last event with the usage of the request.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage so far with every event.")


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
    prompt_logprobs: Nothing = None
    truncate_prompt_tokens: Annotated[None, unsupported("prompts are never clipped; shorten it before sending")] = None
    use_beam_search: Annotated[Literal[False] | None, unsupported("sample instead", (None, False))] = None

    @model_validator(mode="before")
    @classmethod
    def _refused_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check_refused(data)
        return data

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
        own = self.structured_outputs or StructuredOutputs.model_validate({})
        schemas = {
            "structured_outputs.json": own.json_,
            "json_schema": self.json_schema,
            "guided_json": self.guided_json,
        }
        regexes = {
            "structured_outputs.regex": own.regex,
            "regex": self.regex,
            "guided_regex": self.guided_regex,
        }
        grammars = {
            "structured_outputs.grammar": own.grammar,
            "ebnf": self.ebnf,
            "guided_grammar": self.guided_grammar,
        }
        choices = {"structured_outputs.choice": own.choice, "guided_choice": self.guided_choice}
        given = [
            *((name, "json", json.dumps(each) if isinstance(each, dict) else each) for name, each in schemas.items()),
            *((name, "regex", each) for name, each in regexes.items()),
            *((name, "grammar", each) for name, each in grammars.items()),
            *((name, "choice", each and json.dumps(each)) for name, each in choices.items()),
            ("structured_outputs.json_object", "json", json.dumps(ANY_OBJECT) if own.json_object else None),
        ]
        constraints = {name: Constraint(kind, source) for name, kind, source in given if source is not None}
        if self.response_format is not None and (constraint := self.response_format.grammar()) is not None:
            constraints["response_format"] = constraint
        return constraints

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
        given = {name: value for name, value in given.items() if value is not None}
        numbers: dict[str, Any] = dict(defaults or {}) | given
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingParams(
                **(numbers | {"top_k": max(int(numbers.get("top_k", 0)), 0)}),
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
