"""Tokens to text as they come: whole characters only, and nothing that may belong to a stop string."""

import itertools
from collections.abc import Sequence

from kvjax.engine.tokenizer import REPLACEMENT, Tokenizer

MOST_PENDING = 4  # a character has at most 4 bytes, so that many tokens without one hold bytes that are none
CONTEXT = 6  # tokens before the new ones that decide about spaces and joins


class Detokenizer:
    """Turns one sequence's tokens into text step by step; joined, the steps are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the context, then the tokens whose text is not out yet
        self._known = 0  # how many of them are context
        self._prefix = ""  # the text of the context

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        return "".join(self._push(token) for token in tokens)

    def _push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._known < MOST_PENDING:
            return ""
        new = self._beyond_prefix(text)
        self._tokens = self._tokens[-CONTEXT:]
        self._known = len(self._tokens)
        self._prefix = self._tokenizer.decode(self._tokens)
        return new

    def flush(self) -> str:
        """What is left at the end of the sequence, without the bytes of an unfinished character."""
        rest = self._beyond_prefix(self._tokenizer.decode(self._tokens))
        self._tokens, self._known, self._prefix = [], 0, ""
        return rest.rstrip(REPLACEMENT)

    def _beyond_prefix(self, text: str) -> str:
        # bytes that are no characters can change how the context itself decodes
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, self._prefix, strict=False))
        return text[sum(1 for _ in same) :]


class StopStrings:
    """Cuts a text at the first stop string, wherever token borders lie.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that was met, if one was."""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            place, stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            shown, self._held = self._held[:place], ""
            return shown, stop
        keep = max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
