"""What an evaluation asks and what it gets back, whoever answers: an engine in this process or a server far away."""

import abc
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["completion", "chat"]
# A text to go on from, or the messages of a conversation to answer.
Prompt = str | Sequence[dict[str, str]]


class TargetFailedError(RuntimeError):
    """One request got no answer, and others may: too long for the context, refused, broken off."""


class TargetGoneError(TargetFailedError):
    """Nobody answers, so the next request will hardly fare better: the server is gone, the engine has ended."""


class TargetError(ValueError):
    """The target cannot be asked at all as it was described; the message says what to change."""


@dataclass(frozen=True)
class TargetReply:
    """What was generated for one prompt.

    Attributes:
        text: without the prompt.
        finish: why it ended, in OpenAI's words: 'stop' or 'length'.
        prompt_tokens, tokens: how many were read and how many generated.
        first_token_seconds, seconds: from asking to the first text and to the last, waiting in queues included.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Footprint:
    """What a prompt leaves in the KV cache, in bytes.

    Attributes:
        retained: of its K and V, with what a method stores to find its way in them.
        read: by the first decode step after it.
        full: of all its K and V.
    """

    retained: int
    read: int
    full: int


class Target(abc.ABC):
    """A model that can be asked. Answers do not depend on what else it is being asked at the same time.

    Attributes:
        name: for people.
        max_model_len: most tokens of prompt and answer together, None if the target does not tell.
        identity: what names the model and its weights, JSON; answers of two targets that differ in it are
            never joined into one result.
    """

    name: str
    max_model_len: int | None
    identity: Mapping[str, str]

    def footprint(self, length: int) -> Footprint | None:
        """Of a prompt of `length` tokens; None where nobody knows or nothing is compressed."""
        del length
        return None

    @abc.abstractmethod
    def count(self, prompt: Prompt) -> int:
        """Tokens of a text, or of a conversation with the template's own. Blocks; safe from any thread.

        Raises:
            TargetFailedError: they cannot be counted.
        """

    @abc.abstractmethod
    async def complete(
        self,
        prompt: Prompt,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        context_prefix: Prompt | None = None,
        earlier: Prompt | None = None,
    ) -> TargetReply:
        """Generates at most `max_tokens` for one prompt; cancelling it cancels the request.

        Call it only inside `session`, as often at once as the target is to be loaded.

        Args:
            context_prefix: all that a compressed cache may know when it chooses what to keep: the tokens that `prompt` begins
                with as `context_prefix` does. The others are read as if they came later. None is the whole prompt.
            earlier: what came before the conversation's newest turn, for methods that choose by that turn; None in the
                first. Chat servers find it by themselves.

        Raises:
            TargetFailedError: this request got no whole answer.
            TargetGoneError: no request will.
        """

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Holds what belongs to one event loop, such as connections, for as long as it is entered."""
        yield
