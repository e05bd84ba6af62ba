"""`POST /v1/completions`: one to 2,048 prompts, `n` choices of each, in OpenAI's order."""

import contextlib
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvjax.engine.request import Delta
from kvjax.serve.body import JsonRoute
from kvjax.serve.errors import ApiError
from kvjax.serve.generation import Choice, Generation, Reply, answer
from kvjax.serve.logprobs import CompletionLogprobs, joined_columns
from kvjax.serve.protocol import TokenizerProtocol
from kvjax.serve.replies import CompletionChunk, CompletionObject, streamed
from kvjax.serve.retained import extension
from kvjax.serve.schema import CompletionRequest
from kvjax.serve.service import Service
from kvjax.serve.sse import unless_disconnected
from kvjax.serve.tally import StreamTally


class CompletionReply(Reply):
    """Text and columns of log-probabilities. `echoes` are the prompts' texts, one a choice, if asked for."""

    def __init__(
        self, name: str, model: str, body: CompletionRequest, tokenizer: TokenizerProtocol, echoes: list[str]
    ) -> None:
        super().__init__(name, model)
        self._body, self._tokenizer, self._echoes = body, tokenizer, echoes
        self._columns: dict[int, CompletionLogprobs] = {}
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        text, logprobs = delta.text, None
        first = choice.index not in self._columns
        if first:
            self._columns[choice.index] = CompletionLogprobs(self._tokenizer)
        columns = self._columns[choice.index]
        if self._body.logprobs is not None:
            entries, tokens = list(delta.logprobs), [entry.token for entry in delta.logprobs]
            if first and self._body.echo and delta.prompt_logprobs is not None:
                entries, tokens = [*delta.prompt_logprobs, *entries], [*choice.prompt, *tokens]
            logprobs = columns.columns(tokens, entries)
        if first and self._body.echo:
            text = self._echoes[choice.index] + text
        if not text and delta.finish is None and not (logprobs and logprobs["tokens"]):
            return None
        return {
            "index": choice.index,
            "text": text,
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
        columns = [part["logprobs"] for part in parts if part["logprobs"]]
        return parts[-1] | {
            "text": "".join(part["text"] for part in parts),
            "logprobs": joined_columns(columns) if self._body.logprobs is not None else None,
        }

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", responses=streamed(CompletionObject, CompletionChunk), tags=["generate"])
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continues text or tokens."""
        service.require_ready()
        model = service.model(body.model)
        service.warn_unknown(body.unknown())
        prompts = _prompts(body)
        for prompt in prompts:
            if isinstance(prompt, list):
                service.check_tokens(prompt, param="prompt")
        service.check_tokens_of(body)
        service.check_budget(body.token_budget)
        sampling = [
            body.sampling(index, prompt_logprobs=body.logprobs if body.echo else None, defaults=service.defaults)
            for index in range(body.choices)
        ]
        with contextlib.ExitStack() as resources:
            reservation = resources.enter_context(service.admit(len(prompts) * body.choices))
            tokenizer = service.engine.tokenizer
            special = body.add_special_tokens is not False
            await unless_disconnected(request.receive, service.check_constraint(sampling[0].constraint))
            work = _tokens(service, prompts, special)
            tokens = await unless_disconnected(request.receive, work)
            for ids in tokens:
                if not ids:
                    raise ApiError(400, "prompt: it has no tokens; send at least one", param="prompt")
                service.check_context(len(ids), body.max_generated(), param="prompt")
                service.check_selection(len(ids), body.compress_after)
            choices = [
                Choice(
                    index=prompt * body.choices + index,
                    prompt=ids,
                    params=sampling[index],
                    tally=StreamTally(len(ids), counts_prompt=index == 0),
                )
                for prompt, ids in enumerate(tokens)
                for index in range(body.choices)
            ]
            echoes = []
            if body.echo:
                texts = await unless_disconnected(request.receive, _texts(service, prompts))
                echoes = [text for text in texts for _ in range(body.choices)]
            name = f"cmpl-{request.state.request_id}"
            salt = service.salt(request, body.cache_salt)
            generation = Generation(service, choices, reservation=reservation, cache_salt=salt, name=name)
            reply = CompletionReply(name, model, body, tokenizer, echoes)
            options = body.stream_options
            return await answer(
                request,
                generation,
                reply,
                resources,
                stream=bool(body.stream),
                include_usage=bool(options and options.include_usage),
                continuous_usage=bool(options and options.continuous_usage_stats),
            )

    return router


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one, whichever of the four forms they came in."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [each for each in prompt if not isinstance(each, int)]


async def _tokens(service: Service, prompts: list[str | list[int]], special: bool) -> list[list[int]]:
    encode = service.tokenising.encode
    return [
        await encode(prompt, special=special, param="prompt") if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


async def _texts(service: Service, prompts: list[str | list[int]]) -> list[str]:
    decode = service.tokenising.decode
    return [prompt if isinstance(prompt, str) else await decode(prompt) for prompt in prompts]
