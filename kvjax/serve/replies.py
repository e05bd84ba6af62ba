"""Answers, for the OpenAPI document. Routes build plain dictionaries, which is cheaper for a stream of small
events; the tests hold every answer against these models.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from kvjax.serve.errors import POST_ERRORS, ErrorReply, documented

REFERENCE = "#/components/schemas/{model}"


class Exact(BaseModel):
    """Exactly the fields it declares."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class PromptTokensDetails(Exact):
    cached_tokens: int


class Usage(Exact):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobColumns(Exact):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


type FinishReason = Literal["stop", "length"]
type ChatFinishReason = Literal["stop", "length", "tool_calls"]


class RetainedReply(Exact):
    """For each layer the share kept of each bin of the prompt's positions, averaged over heads."""

    prompt_tokens: int
    bins: int
    layers: list[list[float]]


class Extension(Exact):
    """With `return_retained`. `view_fraction`: bytes of the prompt's KV that the views keep, of those of all of it."""

    view_fraction: float
    retained: RetainedReply


class CompletionChoice(Exact):
    index: int
    text: str
    logprobs: CompletionLogprobColumns | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    kvjax: Extension | None = None


class CompletionObject(Exact):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Exact):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Exact):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Exact):
    content: list[ChatLogprob]
    refusal: None


class FunctionReply(Exact):
    name: str
    arguments: str


class ToolCallReply(Exact):
    id: str
    type: Literal["function"]
    function: FunctionReply


class AssistantMessage(Exact):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(Exact):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: str | int | None
    kvjax: Extension | None = None


class ChatCompletion(Exact):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Exact):
    name: str | None = None
    arguments: str


class ToolCallDelta(Exact):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Exact):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Exact):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None
    kvjax: Extension | None = None


class ChatCompletionChunk(Exact):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Exact):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Exact):
    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Exact):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Exact):
    prompt: str


class Alive(Exact):
    status: Literal["alive"]


class Health(Exact):
    status: Literal["ok"]
    phase: Literal["ready"]


class NotReady(ErrorReply):
    """`phase` is what the engine is doing: loading, compiling, draining, stopped or failed."""

    phase: str


class Version(Exact):
    version: str


class SlotState(Exact):
    state: Literal["free", "prefill", "decode", "suspended"]
    tokens: int
    progress: float


class FirstTokenMilliseconds(Exact):
    p50: float | None
    p95: float | None


class RequestCounts(Exact):
    finished: int
    cancelled: int
    failed: int


class Second(Exact):
    tokens_per_second: float
    running: int
    waiting: int


class TierState(Exact):
    """One tier of the KV store. A capacity of 0 is one that the tier does not say; a breaker of "" is none."""

    tier: str
    blocks: int
    used_bytes: int
    capacity_bytes: int
    hit_tokens: int
    written_blocks: int
    errors: int
    breaker: str


class Compression(Exact):
    """What the views do with a prompt as long as the context.

    `retained_tokens` is what each layer's view keeps of it; the shares are bytes, of those of the full cache. A
    `token_budget` of null is one that no flag gave: there is none, or a file has one for each layer.
    """

    method: str
    token_budget: int | None
    headroom: int
    retained_tokens: list[int]
    retained_share: float
    read_share: float


class State(Exact):
    """What the page shows; `history` has one entry a second, the oldest first."""

    phase: str
    model: str
    version: str
    max_model_len: int
    compression: Compression
    uptime_s: float
    slots: list[SlotState]
    waiting: int
    running: int
    suspended: int
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    tokens_per_second: float
    ttft_ms: FirstTokenMilliseconds
    requests: RequestCounts
    compiles_after_warmup: int
    store: list[TierState]
    history: list[Second]


def streamed(model: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Answers of a route that answers whole or as events: each a `chunk` or an error, the last one `[DONE]`."""
    payloads = [{"$ref": REFERENCE.format(model=each.__name__)} for each in (chunk, ErrorReply)]
    event = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": payloads}}
    data = {"anyOf": [{"const": "[DONE]"}, event]}
    events = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {200: {"model": model, "content": {"text/event-stream": events}}, **POST_ERRORS}


def chunk_schemas() -> dict[str, Any]:
    """The models that only events hold, by name: FastAPI does not see them."""
    chunks: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (CompletionChunk, "validation"),
        (ChatCompletionChunk, "validation"),
    ]
    return models_json_schema(chunks, ref_template=REFERENCE)[1]["$defs"]


NOT_READY: dict[int | str, dict[str, Any]] = {503: documented(503)[503] | {"model": NotReady}}
