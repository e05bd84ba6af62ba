"""Incremental detokenization: tokens to text as they come, whole characters only, and stop strings."""

import codecs
from collections.abc import Sequence

from kvjax.engine.text.tokenizer import REPLACEMENT, Tokenizer

MOST_WAITING = 4  # tokens: a character has at most 4 bytes, so after that many the first of them belong to none
CONTEXT = 6  # tokens of the prompt, in which any character is whole
MOST_SILENT = 16  # tokens without a text, such as special ones, that are kept at a time


# Not tokenizers' DecodeStream: it holds bytes back for as long as none of them completes a character, a client may wait
# for thousands of tokens, and it cannot be flushed, so that a text that ends in U+FFFD loses it. Tests show both.
class Detokenizer:
    """Turns one sequence's tokens into text step by step; joined, the steps are the text of all tokens.

    New tokens are decoded behind those that were shown last, which decide about spaces. Both begin at a whole
    character: a tokenizer that falls back on bytes decodes a run of them to nothing but U+FFFD otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        """`prompt` is what the new tokens follow: without it a SentencePiece model loses the first word's space."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # the context, then the tokens whose text is not all out
        self._known = 0  # how many of them are context
        self._shown = ""  # what is out of their text
        self._waiting = 0  # tokens since anything was shown, while a character is unfinished
        before = list(prompt[-CONTEXT:])
        if before and REPLACEMENT not in tokenizer.decode(before):
            self._begin(before)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is unfinished."""
        return "".join(self._push(token) for token in tokens)

    def _push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._beyond(len(self._tokens))
        if text.endswith(REPLACEMENT) and (unfinished := self._unfinished()):
            return self._hold(text, unfinished)
        if text.endswith(REPLACEMENT):  # bytes that are no character would spoil those behind them
            self._begin([])
        elif text:
            self._begin(self._tokens[self._known :])
        elif len(self._tokens) - self._known > MOST_SILENT:
            del self._tokens[self._known]
        return text

    def flush(self) -> str:
        """What is left at the end of the sequence, without the bytes of an unfinished character."""
        text = self._beyond(len(self._tokens))
        self._begin([])
        return text.rstrip(REPLACEMENT)

    def _hold(self, text: str, unfinished: int) -> str:
        """What can be shown of a text whose last tokens hold the beginning of a character."""
        self._waiting += 1
        ready = text.rstrip(REPLACEMENT)
        if ready:
            self._shown += ready
            self._waiting = 0
        elif self._waiting >= MOST_WAITING:
            ready, rest = self._beyond(len(self._tokens) - unfinished), self._tokens[-unfinished:]
            self._begin([])
            self._tokens = rest
        return ready

    def _begin(self, context: list[int]) -> None:
        self._tokens, self._known, self._waiting = context, len(context), 0
        self._shown = self._tokenizer.decode(context)

    def _beyond(self, count: int) -> str:
        """The text of the first `count` tokens that is not out."""
        text = self._tokenizer.decode(self._tokens[:count])
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        return self._tokenizer.decode(self._tokens[self._known : count])  # bytes that are no character changed it

    def _unfinished(self) -> int:
        """How many of the last tokens hold the beginning of a character that is not complete; 0 if there is none."""
        sizes, tail = [], b""
        for token in reversed(self._tokens):
            piece = self._tokenizer.token_bytes(token)
            sizes, tail = [*sizes, len(piece)], piece + tail
            if len(tail) >= 4:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        missing, count = len(decoder.getstate()[0]), 0
        while missing > 0:
            missing, count = missing - sizes[count], count + 1
        return count


class StopStrings:
    """Cuts a text at the stop string that is complete first, the longest of several, wherever token borders lie.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that was met, if one was."""
        self._held += text
        complete = [(self._held.find(stop) + len(stop), stop) for stop in self._stop if stop in self._held]
        if complete:
            end, stop = min(complete, key=lambda pair: (pair[0], -len(pair[1])))
            shown, self._held = self._held[: end - len(stop)], ""
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
