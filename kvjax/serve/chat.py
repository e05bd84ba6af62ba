"""`POST /v1/chat/completions`: a conversation through the model's chat template, `n` answers to it."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvjax.engine.request import Constraint, Delta, Finish, TokenLogprob
from kvjax.serve.body import JsonRoute
from kvjax.serve.chat_schema import ChatCompletionRequest
from kvjax.serve.chat_template import ChatPrompt, require_template
from kvjax.serve.generation import Choice, Generation, Reply, answer
from kvjax.serve.logprobs import chat_logprobs
from kvjax.serve.messages import NamedTool
from kvjax.serve.output.message import MessageReader, joined
from kvjax.serve.output.reasoning import BEGIN, ReasoningParser
from kvjax.serve.output.tool_calls import JSON, ToolCallParser, format_of, parameters_schema, required_schema
from kvjax.serve.protocol import TokenizerProtocol
from kvjax.serve.replies import ChatCompletion, ChatCompletionChunk, streamed
from kvjax.serve.retained import extension
from kvjax.serve.service import Service
from kvjax.serve.sse import unless_disconnected
from kvjax.serve.tally import StreamTally
from kvjax.serve.turn import newest_turn


class ChatReply(Reply):
    """Messages of the assistant. `readers` make a message of a choice's text, one for each choice."""

    def __init__(
        self,
        name: str,
        model: str,
        body: ChatCompletionRequest,
        tokenizer: TokenizerProtocol,
        readers: list[MessageReader],
    ) -> None:
        super().__init__(name, model)
        self._body, self._tokenizer, self._readers = body, tokenizer, readers
        self._began: set[int] = set()
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        reader = self._readers[choice.index]
        message = reader.push(delta.text, delta.finish is not None)
        if choice.index not in self._began:
            self._began.add(choice.index)
            message = {"role": "assistant", "content": ""} | message
        logprobs = None
        if self._body.logprobs:
            content = chat_logprobs(self._tokenizer, _shown(self._tokenizer, delta), self._body.top_logprobs or 0)
            logprobs = {"content": content, "refusal": None}
        if not message and delta.finish is None and not (logprobs and logprobs["content"]):
            return None
        finish = "tool_calls" if delta.finish is Finish.STOP and reader.calls else delta.finish
        return {
            "index": choice.index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": finish,
            "stop_reason": delta.stop_reason,
        } | (extension(choice.tally) if delta.finish else {})

    def add(self, choice: Choice, delta: Delta) -> None:
        part = self.chunk(choice, delta)
        if part is not None:
            self._parts.setdefault(choice.index, []).append(part)

    def whole(self, choice: Choice) -> dict[str, Any]:
        parts = self._parts[choice.index]
        logprobs = None
        if self._body.logprobs:
            logprobs = {
                "content": [entry for part in parts for entry in part["logprobs"]["content"]],
                "refusal": None,
            }
        return {
            "index": choice.index,
            "message": joined([part["delta"] for part in parts]),
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
            "stop_reason": parts[-1]["stop_reason"],
        } | extension(choice.tally)

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "chat.completion.chunk" if streamed else "chat.completion",
            "created": self.created,
            "model": self.model,
        }


def _shown(tokenizer: TokenizerProtocol, delta: Delta) -> Sequence[TokenLogprob]:
    """Log-probabilities of the message's tokens: the one that ends it is not a part of it."""
    if delta.finish is Finish.STOP and delta.logprobs and not isinstance(delta.stop_reason, str):
        last = delta.logprobs[-1].token
        if delta.stop_reason == last or not tokenizer.decode([last]):
            return delta.logprobs[:-1]
    return delta.logprobs


def _readers(body: ChatCompletionRequest, template: str | None, prompt: str) -> list[MessageReader]:
    """A reader for each choice."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    names = [tool["function"]["name"] for tool in body.offered_tools]
    form = JSON if body.forced_tools else format_of(template)
    thinks = ReasoningParser.applies(template) and body.constraint is None and not body.forced_tools
    thinking = prompt.rstrip().endswith(BEGIN)
    parallel = body.parallel_tool_calls is not False
    return [
        MessageReader(
            ReasoningParser(thinking) if thinks else None,
            ToolCallParser(form, names, forced=named, parallel=parallel) if names else None,
        )
        for _ in range(body.choices)
    ]


def _forced_call(body: ChatCompletionRequest) -> Constraint | None:
    """The grammar of an answer that has to be a call."""
    if not body.forced_tools:
        return None
    tools = body.offered_tools
    if isinstance(body.tool_choice, NamedTool):
        [tool] = [each for each in tools if each["function"]["name"] == body.tool_choice.function.name][:1]
        return Constraint("json", json.dumps(parameters_schema(tool)))
    return Constraint("json", json.dumps(required_schema(tools, parallel=body.parallel_tool_calls is not False)))


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=streamed(ChatCompletion, ChatCompletionChunk), tags=["generate"])
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        """Answers a conversation."""
        service.require_ready()
        model = service.model(body.model)
        service.warn_unknown(body.unknown())
        require_template(service.engine.tokenizer)
        service.check_tokens_of(body)
        service.check_budget(body.token_budget)
        constraint = _forced_call(body)
        sampling = [
            body.sampling(index, constraint=constraint, defaults=service.defaults) for index in range(body.choices)
        ]
        with contextlib.ExitStack() as resources:
            reservation = resources.enter_context(service.admit(body.choices))
            tokenizer, tokenising = service.engine.tokenizer, service.tokenising
            chat = ChatPrompt.of(body)
            await unless_disconnected(request.receive, service.check_constraint(sampling[0].constraint))
            text = await unless_disconnected(request.receive, tokenising.run(chat.characters, chat.render))
            encoding = tokenising.encode(text, special=False, param="messages")
            prompt = await unless_disconnected(request.receive, encoding)
            service.check_context(len(prompt), body.max_generated(), param="messages")
            service.check_selection(len(prompt), body.compress_after)
            if service.engine.caches.multi_turn:
                finding = tokenising.run(len(text), lambda tokenizer: newest_turn(tokenizer, chat, prompt))
                turn = await unless_disconnected(request.receive, finding)
                sampling = [dataclasses.replace(params, turn=turn) for params in sampling]
            choices = [
                Choice(index, prompt, sampling[index], StreamTally(len(prompt), counts_prompt=index == 0))
                for index in range(body.choices)
            ]
            name = f"chatcmpl-{request.state.request_id}"
            salt = service.salt(request, body.cache_salt)
            generation = Generation(service, choices, reservation=reservation, cache_salt=salt, name=name)
            options = body.stream_options
            return await answer(
                request,
                generation,
                ChatReply(name, model, body, tokenizer, _readers(body, tokenizer.chat_template, text)),
                resources,
                stream=bool(body.stream),
                include_usage=bool(options and options.include_usage),
                continuous_usage=bool(options and options.continuous_usage_stats),
            )

    return router
