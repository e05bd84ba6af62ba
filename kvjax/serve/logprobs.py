"""Log-probabilities in OpenAI's two shapes: columns for completions, one object a token for chat."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from kvjax.engine.request import TokenLogprob
from kvjax.serve.protocol import TokenizerProtocol

LOWEST = -9999.0  # what OpenAI sends for a token that could not be drawn: JSON has no minus infinity


class TokenNames:
    """How tokens are shown. One that is not whole characters is `bytes:\\xe2\\x82`, as OpenAI has it: as text
    two such tokens would look the same, and the columns are keyed by it.
    """

    def __init__(self, tokenizer: TokenizerProtocol) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def name(self, token: int) -> str:
        if token not in self._names:
            self._names[token] = self._make(token)
        return self._names[token]

    def _make(self, token: int) -> str:
        text = self._tokenizer.token_text(token)
        if "�" in text:
            raw = self._tokenizer.token_bytes(token)
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text

    def width(self, token: int) -> bytes:
        """The bytes the token adds to the text: none for a special token, which is never shown."""
        shown = self._tokenizer.decode([token])
        return self._tokenizer.token_bytes(token) if shown else b""


class CompletionLogprobs:
    """The columns of one choice. Offsets go on from call to call, so that a stream's parts fit together."""

    def __init__(self, tokenizer: TokenizerProtocol) -> None:
        self._names = TokenNames(tokenizer)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def columns(self, tokens: Sequence[int], entries: Iterable[TokenLogprob | None]) -> dict[str, Any]:
        """`tokens`, `token_logprobs`, `top_logprobs` and `text_offset` of the next tokens.

        An entry of None is a token without a log-probability: the first of a prompt.
        """
        names, values, tops, offsets = [], [], [], []
        for token, entry in zip(tokens, entries, strict=True):
            names.append(self._names.name(token))
            values.append(None if entry is None else finite(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._names.width(token)))
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """Best first; the token itself is always there, and of two that share a name the likelier one."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(self._names.name(token), finite(logprob))
        return top


def joined_columns(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of several consecutive calls as one."""
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [value for part in parts for value in part[key]] for key in keys}


def chat_logprobs(tokenizer: TokenizerProtocol, entries: Iterable[TokenLogprob], count: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat choice, with at most `count` alternatives for each token."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes(token))
        return {"token": tokenizer.token_text(token), "logprob": finite(logprob), "bytes": raw}

    return [
        shown(entry.token, entry.logprob)
        | {"top_logprobs": [shown(token, logprob) for token, logprob in entry.top[:count]]}
        for entry in entries
    ]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
