"""Tokenising: text to tokens and back in threads of its own, bounded in work and in places.

A tokenizer takes a second or so for each million characters and cannot be interrupted. So a text that cannot fit the
context is refused before; short texts have a thread that no long one holds up; what a client no longer waits for is
not begun; and of several prompts each is a part of its own, between which others have their turn.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any

from kvjax.engine.request import ContextLengthExceededError
from kvjax.serve.errors import from_engine, unavailable
from kvjax.serve.protocol import EngineProtocol, TokenizerProtocol

SHORT_CHARACTERS = 32_768  # about 30 ms
# A text of this many characters for each token of the context is tried by its beginning first.
LONG_FACTOR, TRIAL_FACTOR = 16, 8
TRIAL_SLACK = 64  # tokens by which a beginning may differ from the same part of the whole


class TooLongError(ContextLengthExceededError):
    """A text that is known to have too many tokens before all of them are counted."""

    def __init__(self, least: int, max_model_len: int) -> None:
        ValueError.__init__(
            self,
            f"the prompt has at least {least} tokens; this model's context is {max_model_len} tokens. "
            "Shorten the prompt",
        )
        self.prompt_tokens, self.max_tokens, self.max_model_len = least, 0, max_model_len


class Tokenising:
    """The tokenizer of an engine, for the routes. Raises ApiError: 400 for what cannot fit, 503 with no place left.

    Args:
        places: texts that may wait for each of the two threads.
    """

    def __init__(self, engine: EngineProtocol, places: int) -> None:
        self._engine, self._places = engine, places
        self._threads = {
            kind: concurrent.futures.ThreadPoolExecutor(1, f"kvjax-tokenise-{kind}") for kind in ("short", "long")
        }
        self._pending = dict.fromkeys(self._threads, 0)

    async def encode(self, text: str, *, special: bool = True, param: str) -> list[int]:
        """Token ids of a text that may fit the context."""
        tokenizer = self._engine.tokenizer
        return await self._bounded(text, param, lambda each: tokenizer.encode(each, add_special_tokens=special))

    async def decode(self, ids: Sequence[int], **options: Any) -> str:
        tokenizer = self._engine.tokenizer
        return await self._run(4 * len(ids), lambda: tokenizer.decode(ids, **options))

    async def run[T](self, characters: int, work: Callable[[TokenizerProtocol], T]) -> T:
        """Other work of the tokenizer's on a text of that size."""
        tokenizer = self._engine.tokenizer
        return await self._run(characters, lambda: work(tokenizer))

    async def _bounded(self, text: str, param: str, encode: Callable[[str], list[int]]) -> list[int]:
        self._refuse(len(text), param)
        limit = self._engine.max_model_len
        if len(text) > LONG_FACTOR * limit:
            beginning = text[: TRIAL_FACTOR * limit]
            least = len(await self._run(len(beginning), lambda: encode(beginning))) - TRIAL_SLACK
            if least > limit:
                raise from_engine(TooLongError(least, limit), param=param)
        return await self._run(len(text), lambda: encode(text))

    def _refuse(self, characters: int, param: str) -> None:
        """Raises ApiError (400) for what has too many tokens even if each is the longest of the vocabulary."""
        longest, limit = self._engine.tokenizer.max_token_characters, self._engine.max_model_len
        if longest is not None and characters > longest * limit:
            raise from_engine(TooLongError(-(-characters // longest), limit), param=param)

    async def _run[T](self, characters: int, work: Callable[[], T]) -> T:
        kind = "short" if characters <= SHORT_CHARACTERS else "long"
        if self._pending[kind] >= self._places:
            raise unavailable(f"{self._places} texts wait to be tokenised", "overloaded")
        self._pending[kind] += 1
        # cancelled before it has begun, it leaves the executor's queue
        future = self._threads[kind].submit(work)
        future.add_done_callback(self._leave(kind, asyncio.get_running_loop()))
        return await asyncio.wrap_future(future)

    def _leave(self, kind: str, loop: asyncio.AbstractEventLoop) -> Callable[[Any], None]:
        """Counts a text out, in the loop's thread, for one that is cancelled ends in another than one that is done."""

        def subtract() -> None:
            self._pending[kind] -= 1

        def left(_: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(subtract)

        return left
