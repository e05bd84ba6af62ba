"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from kvjax.serve.body import JsonRoute
from kvjax.serve.chat_template import ChatPrompt, require_template
from kvjax.serve.errors import POST_ERRORS
from kvjax.serve.replies import Detokenized, Tokenized
from kvjax.serve.schema import DetokenizeRequest, TokenizeRequest
from kvjax.serve.service import Service
from kvjax.serve.sse import unless_disconnected


def token_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, responses=POST_ERRORS, tags=["tokens"])

    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(request: Request, body: TokenizeRequest) -> JSONResponse:
        """Token ids of a prompt or of a conversation."""
        service.require_ready()
        service.model(body.model)
        service.warn_unknown(body.unknown())
        tokenizer, tokenising = service.engine.tokenizer, service.tokenising
        text, special, param = body.prompt or "", body.add_special_tokens is not False, "prompt"
        if body.messages is not None:
            require_template(tokenizer)
            chat = ChatPrompt(body.messages, body.add_generation_prompt is not False)
            special, param = False, "messages"
            text = await unless_disconnected(request.receive, tokenising.run(chat.characters, chat.render))
        encoding = tokenising.encode(text, special=special, param=param)
        ids = await unless_disconnected(request.receive, encoding)
        return JSONResponse(
            {
                "count": len(ids),
                "max_model_len": service.engine.max_model_len,
                "tokens": ids,
                "token_strs": [tokenizer.token_text(id) for id in ids] if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(request: Request, body: DetokenizeRequest) -> JSONResponse:
        """The text of token ids, special tokens included, so that nothing is lost."""
        service.require_ready()
        service.model(body.model)
        service.warn_unknown(body.unknown())
        service.check_tokens(body.tokens, param="tokens")
        decoding = service.tokenising.decode(body.tokens, skip_special_tokens=False)
        text = await unless_disconnected(request.receive, decoding)
        return JSONResponse({"prompt": text})

    return router
