"""Engine protocol: the interfaces that the server is written against, so that a test can serve a fake engine.

Methods are called from the event loop's thread unless they say otherwise; only `start` and `drain` block.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from kvjax.engine.request import Constraint, Delta, SamplingParams
from kvjax.engine.stats import EngineStats


@runtime_checkable
class TokenizerProtocol(Protocol):
    """Text to token ids and back. `encode`, `decode` and `render` are slow: call them in worker threads."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        ...

    @property
    def max_token_characters(self) -> int | None:
        """Most characters of a text that one token stands for; None where there is no such bound."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation's prompt; raises ValueError in the template's words if it refuses."""
        ...

    def token_text(self, token: int) -> str:
        """One token as text; holds U+FFFD where it ends inside a character."""
        ...

    def token_bytes(self, token: int) -> bytes: ...


@runtime_checkable
class ReservationProtocol(Protocol):
    """Places in the engine for a request's streams. Each `stream` takes one; leaving frees the rest."""

    def __enter__(self) -> "ReservationProtocol": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


@runtime_checkable
class CacheConfigProtocol(Protocol):
    """What each layer keeps of a prompt: `kvjax.engine.device.cache_config`. Bytes are those of one sequence."""

    @property
    def layout(self) -> Any: ...

    @property
    def plans(self) -> Sequence[Any]: ...

    @property
    def multi_turn(self) -> bool:
        """Whether a request's `turn` has any effect."""
        ...

    def within(self, token_budget: int | None) -> Any:
        """The caches of a request with a token budget of its own; raises ValueError with what it may be."""
        ...

    def full_bytes(self, length: int) -> int: ...

    def retained_bytes(self, length: int) -> int: ...

    def read_bytes(self, length: int) -> int: ...


@runtime_checkable
class EngineProtocol(Protocol):
    """One model that generates. Its properties and `stats` answer in every phase, the rest once it is ready."""

    @property
    def tokenizer(self) -> TokenizerProtocol: ...

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def generation_defaults(self) -> Mapping[str, float]:
        """Values of sampling parameters that the model's publisher recommends."""
        ...

    @property
    def caches(self) -> CacheConfigProtocol: ...

    @property
    def phase(self) -> str:
        """loading, compiling, ready, draining, stopped or failed."""
        ...

    @property
    def failure(self) -> BaseException | None: ...

    def start(self) -> None:
        """Loads, compiles and warms up. Blocks, so it runs in a thread."""
        ...

    def startup_report(self) -> str | Sequence[tuple[str, str]]: ...

    def reserve(self, count: int = 1) -> ReservationProtocol:
        """Raises `QueueFullError` at once when slots and queue have no `count` places left."""
        ...

    def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        reservation: Any = None,
        cache_salt: str = "",
        request_id: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Raises `ContextLengthExceededError` or `ValueError` before the first delta. `aclose` cancels."""
        ...

    def check_constraint(self, constraint: Constraint) -> None:
        """Compiles a grammar. Slow: call it in worker threads. Raises ConstraintError with the reason."""
        ...

    def stats(self) -> EngineStats: ...

    def store_stats(self) -> Mapping[str, Any]:
        """What each tier of the KV store holds and has done: `kvjax.store.stats.TierStats` by tier, nearest first."""
        ...

    def drain(self, timeout: float) -> None:
        """Refuses new requests, finishes those that run, cancels the rest after `timeout` seconds. Blocks."""
        ...

    def close(self, timeout: float) -> bool:
        """Ends what is left; returns whether all has ended within about `timeout` seconds. Blocks."""
        ...
