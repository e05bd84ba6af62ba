"""Servers with the OpenAI API as targets, through openai-python.

Replies are streamed, so that the time to the first token is known. Retries (429, 5xx, lost connections before the
first byte) are the client's; what is left after them is an error of the sample.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from kvjax.eval.targets.target import (
    Prompt,
    Target,
    TargetError,
    TargetFailedError,
    TargetGoneError,
    TargetReply,
    TargetRequest,
)

RETRIES = 3


class OpenAITarget(Target):
    """The model `model` behind `url`. Tokens are counted by a local tokenizer or by the server's /tokenize."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Lists the server's models, and makes sure that tokens can be counted.

        Args:
            url: of the server, with or without `/v1` at its end.
            model: one of the server's; None takes its first.
            api_key: sent as the bearer token; None sends a dummy.
            tokenizer: folder of the tokenizer that the model uses; None asks the server's /tokenize.
            timeout: seconds without a byte after which a request has failed.

        Raises:
            TargetError: openai is missing, the address is invalid or does not answer, there is no such model,
                or there is no way to count tokens.
        """
        try:
            import openai
        except ImportError as error:
            raise TargetError('--url needs the openai client: pip install "kvjax[eval]"') from error
        self._openai = openai
        self._base, self._root = _addresses(url)
        self._options: dict[str, Any] = {
            "base_url": self._base,
            "api_key": api_key or "none",
            "max_retries": RETRIES,
            "timeout": timeout,
        }
        self._async: Any = None
        self._tokenizer = _read_tokenizer(tokenizer)
        self._sync = openai.OpenAI(**self._options)
        try:
            card = self._card(model)
            self._model: str = card.id
            self._check_count()
        except TargetError:
            self.close()
            raise
        self.name = f"{card.id} at {self._root}"
        self.max_model_len = getattr(card, "max_model_len", None)
        # another tokenizer counts otherwise, so it makes other samples
        self.identity = {"model": card.id, "url": self._base, "tokenizer": tokenizer or "/tokenize"}

    def close(self) -> None:
        """Closes the connections that counted tokens."""
        self._sync.close()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        async with self._openai.AsyncOpenAI(**self._options) as self._async:
            try:
                yield
            finally:
                self._async = None

    def count(self, prompt: Prompt) -> int:
        if self._tokenizer is not None:
            if isinstance(prompt, str):
                return len(self._tokenizer.encode(prompt))
            try:
                return len(self._tokenizer.apply_chat_template(prompt))
            except ValueError as error:
                raise TargetFailedError(str(error)) from error
        field = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        body = {"model": self._model, **field}
        try:
            counted: Any = self._sync.post(f"{self._root}/tokenize", cast_to=object, body=body)
            return int(counted["count"])
        except self._openai.APIConnectionError as error:
            raise TargetGoneError(_sentence(error)) from error
        except (self._openai.APIError, KeyError, TypeError, ValueError) as error:
            raise TargetFailedError(_sentence(error)) from error

    async def complete(self, request: TargetRequest) -> TargetReply:
        prompt = request.prompt
        if request.context_prefix is not None:
            raise TargetFailedError("a server's cache always sees the whole prompt: evaluate an engine in this process")
        options: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, finish, usage, first, began = "", None, None, None, time.monotonic()
        try:
            if isinstance(prompt, str):
                stream = await self._async.completions.create(prompt=prompt, **options)
            else:
                stream = await self._async.chat.completions.create(messages=list(prompt), **options)
        except self._openai.APIConnectionError as error:
            raise TargetGoneError(_sentence(error)) from error
        except self._openai.APIError as error:
            raise TargetFailedError(_sentence(error)) from error
        try:
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    new = choice.text if isinstance(prompt, str) else choice.delta.content
                    if new and first is None:
                        first = time.monotonic()
                    text += new or ""
                    finish = choice.finish_reason or finish
        except Exception as error:
            if isinstance(error, self._openai.APIError) and not isinstance(error, self._openai.APIConnectionError):
                raise TargetFailedError(_sentence(error)) from error
            # openai 2 lets errors of the HTTP library below it through here
            raise TargetGoneError(f"the connection broke in the middle of an answer: {_sentence(error)}") from error
        finally:
            await stream.close()
        if finish is None:
            raise TargetFailedError("the answer breaks off: it has no finish_reason")
        now = time.monotonic()
        return TargetReply(
            text,
            finish,
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            (first or now) - began,
            now - began,
        )

    def _check_count(self) -> None:
        try:
            self.count("A word or two.")
        except TargetFailedError as error:
            raise TargetError(
                f"{self._root} has no /tokenize that answers ({error}); give the model's tokenizer "
                f"with --tokenizer FOLDER"
            ) from error

    def _card(self, model: str | None) -> Any:
        """The server's description of the model."""
        try:
            cards = {card.id: card for card in self._sync.models.list().data}
        except self._openai.APIConnectionError as error:
            raise TargetError(f"no answer from {self._base}: start the server, or check --url") from error
        except self._openai.AuthenticationError as error:
            raise TargetError(f"{self._base} wants another key: set OPENAI_API_KEY or --api-key") from error
        except self._openai.APIError as error:
            raise TargetError(f"{self._base}/models: {_sentence(error)}; check --url") from error
        if model is None and cards:
            return next(iter(cards.values()))
        if model not in cards:
            raise TargetError(f"{self._base} has no model {model!r}; it has {', '.join(cards) or 'none'}")
        return cards[model]


def _addresses(url: str) -> tuple[str, str]:
    """The address of the API and that of the server: 'http://host:8000/v1' and 'http://host:8000'."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise TargetError(f"url={url!r} is no address: write it as http://localhost:8000")
    given = url.rstrip("/")
    root = given.removesuffix("/v1")
    return (given if parts.path.strip("/") else f"{given}/v1"), root


def _read_tokenizer(folder: str | None) -> Any:
    if folder is None:
        return None
    from kvjax.engine.text.tokenizer import Tokenizer

    try:
        return Tokenizer.from_pretrained(folder)
    except FileNotFoundError as error:
        raise TargetError(f"--tokenizer: {error}") from error


def _sentence(error: Exception) -> str:
    """The server's own words if it has any, on one line."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error or type(error).__name__).split())
