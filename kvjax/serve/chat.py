"""`POST /v1/chat/completions`: a conversation through the model's chat template, `n` answers to it."""

import asyncio
import contextlib
import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvjax.engine.request import Delta
from kvjax.serve.body import JsonRoute
from kvjax.serve.chat_template import apply_template, require_template
from kvjax.serve.generation import Choice, Generation, Reply, answer
from kvjax.serve.logprobs import chat_logprobs
from kvjax.serve.protocol import TokenizerProtocol
from kvjax.serve.replies import ChatCompletion, ChatCompletionChunk, streamed
from kvjax.serve.retained import extension
from kvjax.serve.schema import ChatCompletionRequest
from kvjax.serve.service import Service
from kvjax.serve.sse import unless_disconnected
from kvjax.serve.tally import StreamTally
from kvjax.serve.turn import newest_turn


class ChatReply(Reply):
    """Messages of the assistant."""

    def __init__(self, name: str, model: str, body: ChatCompletionRequest, tokenizer: TokenizerProtocol) -> None:
        super().__init__(name, model)
        self._body, self._tokenizer = body, tokenizer
        self._began: set[int] = set()
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        message: dict[str, Any] = {}
        if choice.index not in self._began:
            self._began.add(choice.index)
            message = {"role": "assistant", "content": ""}
        if delta.text:
            message["content"] = delta.text
        logprobs = None
        if self._body.logprobs:
            content = chat_logprobs(self._tokenizer, delta.logprobs, self._body.top_logprobs or 0)
            logprobs = {"content": content, "refusal": None}
        if not message and delta.finish is None and not (logprobs and logprobs["content"]):
            return None
        return {
            "index": choice.index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        } | (extension(choice.tally) if delta.finish else {})

    def add(self, choice: Choice, delta: Delta) -> None:
        part = self.chunk(choice, delta)
        if part is not None:
            self._parts.setdefault(choice.index, []).append(part)

    def whole(self, choice: Choice) -> dict[str, Any]:
        parts = self._parts[choice.index]
        text = "".join(part["delta"].get("content", "") for part in parts)
        logprobs = None
        if self._body.logprobs:
            logprobs = {
                "content": [entry for part in parts for entry in part["logprobs"]["content"]],
                "refusal": None,
            }
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
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


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/chat/completions", responses=streamed(ChatCompletion, ChatCompletionChunk), tags=["generate"])
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        """Answers a conversation."""
        service.require_ready()
        model = service.model(body.model)
        service.warn_unknown(body.unknown())
        require_template(service.engine.tokenizer)
        service.check_bias(body)
        service.check_budget(body.token_budget)
        sampling = [body.sampling(index) for index in range(body.choices)]
        with contextlib.ExitStack() as resources:
            reservation = resources.enter_context(service.admit(body.choices))
            tokenizer = service.engine.tokenizer
            generation_prompt = body.add_generation_prompt is not False
            work = asyncio.to_thread(apply_template, tokenizer, body.messages, generation_prompt)
            prompt = await unless_disconnected(request.receive, work)
            service.check_context(len(prompt), body.max_generated(), param="messages")
            service.check_selection(len(prompt), body.compress_after)
            if service.engine.caches.multi_turn:
                finding = asyncio.to_thread(newest_turn, tokenizer, body.messages, prompt)
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
                ChatReply(name, model, body, tokenizer),
                resources,
                stream=bool(body.stream),
                include_usage=bool(options and options.include_usage),
                continuous_usage=bool(options and options.continuous_usage_stats),
            )

    return router
