"""The interface of a target: a model that answers prompts, be it an engine in this process or a server."""

import abc
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["completion", "chat"]
# A text to go on from, or the messages of a conversation to answer.
Prompt = str | Sequence[dict[str, str]]


class TargetFailedError(RuntimeError):
    """One request has failed, and others may not: too long for the context, refused, broken off."""


class TargetGoneError(TargetFailedError):
    """The target is unreachable, so further requests will fail too: the server is gone, the engine has ended."""


class TargetError(ValueError):
    """The target cannot be opened as it was described; the message says what to change."""


@dataclass(frozen=True)
class TargetRequest:
    """One prompt and the sampling of its continuation.

    Attributes:
        max_tokens: generated at most.
        temperature: 0 is greedy.
        context_prefix: all that a compressed cache may see of `prompt` when it chooses the tokens to retain: those that
            `prompt` begins with as `context_prefix` does. The others are read as if they came later. None is the
            whole prompt.
        history: the conversation before its newest turn, for methods that choose by that turn; None in the first.
            Chat servers infer it.
    """

    prompt: Prompt
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    context_prefix: Prompt | None = None
    history: Prompt | None = None


@dataclass(frozen=True)
class TargetReply:
    """The continuation of one prompt.

    Attributes:
        text: without the prompt.
        finish: OpenAI's finish reason: 'stop' or 'length'.
        prompt_tokens, tokens: numbers of tokens read and generated.
        first_token_seconds, seconds: from the request to the first text and to the last, time in queues included.
    """

    text: str
    finish: str
    prompt_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float


@dataclass(frozen=True)
class Footprint:
    """The KV cache of a prompt, in bytes.

    Attributes:
        retained: of its K and V, with the method's index of them.
        read: by the first decode step after it.
        full: of all its K and V.
    """

    retained: int
    read: int
    full: int


class Target(abc.ABC):
    """A model behind an interface of text. A reply does not depend on concurrent requests.

    Attributes:
        name: for people.
        max_model_len: most tokens of prompt and reply together, None if unknown.
        identity: JSON that identifies the model and its weights; replies of two targets that differ in it are
            never joined into one result.
    """

    name: str
    max_model_len: int | None
    identity: Mapping[str, str]

    def footprint(self, length: int) -> Footprint | None:
        """The footprint of a prompt of `length` tokens; None if unknown or uncompressed."""
        del length
        return None

    @abc.abstractmethod
    def count(self, prompt: Prompt) -> int:
        """Tokens of a text, or of a conversation with the template's own. Blocks; safe from any thread.

        Raises:
            TargetFailedError: they cannot be counted.
        """

    @abc.abstractmethod
    async def complete(self, request: TargetRequest) -> TargetReply:
        """The reply to one request; cancelling it cancels the request.

        Call it only inside `session`, as often at once as the target is to be loaded.

        Raises:
            TargetFailedError: this request has no complete reply.
            TargetGoneError: no request will.
        """

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Holds what belongs to one event loop, such as connections, for as long as it is entered."""
        yield
