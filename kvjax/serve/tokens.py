"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

import asyncio

from fastapi import APIRouter
from starlette.responses import JSONResponse

from kvjax.serve.body import JsonRoute
from kvjax.serve.chat_template import apply_template, require_template
from kvjax.serve.errors import POST_ERRORS
from kvjax.serve.replies import Detokenized, Tokenized
from kvjax.serve.schema import DetokenizeRequest, TokenizeRequest
from kvjax.serve.service import Service


def token_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, responses=POST_ERRORS, tags=["tokens"])

    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest) -> JSONResponse:
        """Token ids of a prompt or of a conversation."""
        service.require_ready()
        service.model(body.model)
        service.warn_unknown(body.unknown())
        tokenizer = service.engine.tokenizer
        if body.messages is None:
            special = body.add_special_tokens is not False
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt or "", add_special_tokens=special)
        else:
            require_template(tokenizer)
            generation_prompt = body.add_generation_prompt is not False
            ids = await asyncio.to_thread(apply_template, tokenizer, body.messages, generation_prompt)
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": service.engine.max_model_len,
                "tokens": ids,
                "token_strs": [tokenizer.token_text(id) for id in ids] if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> JSONResponse:
        """The text of token ids, special tokens included, so that nothing is lost."""
        service.require_ready()
        service.model(body.model)
        service.warn_unknown(body.unknown())
        service.check_tokens(body.tokens, param="tokens")
        decode = service.engine.tokenizer.decode
        text = await asyncio.to_thread(decode, body.tokens, skip_special_tokens=False)
        return JSONResponse({"prompt": text})

    return router
