"""Conversation: the host's side of a request that was cut off, enough to recognise it and to go on."""

import dataclasses
from typing import Any

import numpy as np

from kvjax.engine.active_request import ActiveRequest
from kvjax.engine.request import Constraint, SamplingParams, TokenLogprob


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A request without a caller. Where it stands on the device is in the arrays of its slot.

    Attributes:
        prompt: token ids [T] int32.
        stop_token_ids, limit: as of the request.
        tokens: what it has generated, at least one; `logprobs` if they were asked for.
        retained: tokens of the prompt that the views retained, as in `Delta`.
    """

    prompt: np.ndarray
    params: SamplingParams
    cache_salt: str
    stop_token_ids: tuple[int, ...]
    limit: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    retained: tuple[np.ndarray, ...] | None = None

    def __post_init__(self) -> None:
        if not (len(self.prompt) and self.tokens):
            raise ValueError(
                f"a conversation of {len(self.prompt)} prompt tokens and {len(self.tokens)} generated ones: both must "
                "be at least 1, for it to be known again and to go on"
            )

    @classmethod
    def of(cls, request: ActiveRequest) -> "Conversation":
        """That of a request as far as it was delivered."""
        return cls(
            request.prompt,
            request.params,
            request.cache_salt,
            request.stop_token_ids,
            request.limit,
            tuple(request.tokens),
            tuple(request.logprobs),
            request.prompt_logprobs,
            request.retained,
        )

    @property
    def position(self) -> int:
        """Of the last token, which no view holds yet."""
        return len(self.prompt) + len(self.tokens) - 1

    def answers(self, request: ActiveRequest) -> bool:
        """Whether the request asks for just this: its answer begins with these tokens and goes on where they end.

        A request without a seed asks for any draw, so for this one too.
        """
        own = (self.cache_salt, self.params, self.stop_token_ids, self.limit)
        other = (request.cache_salt, request.params, request.stop_token_ids, request.limit)
        return own == other and np.array_equal(self.prompt, request.prompt)

    def hand_over(self, request: ActiveRequest) -> None:
        """Delivers at once to an equal request what was generated before. Raises what `accept` does."""
        request.scheduled()
        request.cached = {"suspended": len(self.prompt)}
        request.resumed = len(self.tokens)
        request.prompt_logprobs, request.retained = self.prompt_logprobs, self.retained
        request.accept(self.tokens, self.logprobs)

    def to_json(self) -> dict[str, Any]:
        """Everything but `retained`, for JSON."""
        given = {field.name: getattr(self.params, field.name) for field in dataclasses.fields(self.params)}
        given["constraint"] = self.params.constraint and dataclasses.asdict(self.params.constraint)
        given["logit_bias"] = [[int(token), _plain(bias)] for token, bias in self.params.logit_bias.items()]
        prompt = self.prompt_logprobs
        return {
            "prompt": self.prompt.tolist(),
            "params": {name: _plain(value) for name, value in given.items()},
            "cache_salt": self.cache_salt,
            "stop_token_ids": list(self.stop_token_ids),
            "limit": self.limit,
            "tokens": list(self.tokens),
            "logprobs": [_listed(each) for each in self.logprobs],
            "prompt_logprobs": None if prompt is None else [each and _listed(each) for each in prompt],
        }

    @classmethod
    def from_json(cls, read: dict[str, Any], retained: tuple[np.ndarray, ...] | None = None) -> "Conversation":
        """What `to_json` has written.

        Raises:
            ValueError, TypeError, KeyError: it has not.
        """
        given = dict(read["params"])
        given["logit_bias"] = dict(given["logit_bias"])
        given["constraint"] = given["constraint"] and Constraint(**given["constraint"])
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            given[name] = tuple(given[name])
        prompt = read["prompt_logprobs"]
        return cls(
            np.asarray(read["prompt"], np.int32),
            SamplingParams(**given),
            read["cache_salt"],
            tuple(read["stop_token_ids"]),
            read["limit"],
            tuple(read["tokens"]),
            tuple(_logprob(each) for each in read["logprobs"]),
            None if prompt is None else tuple(each and _logprob(each) for each in prompt),
            retained,
        )


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which JSON knows."""
    return value.item() if isinstance(value, np.generic) else value


def _listed(logprob: TokenLogprob) -> list[Any]:
    return [logprob.token, logprob.logprob, logprob.top]


def _logprob(read: list[Any]) -> TokenLogprob:
    token, value, top = read
    return TokenLogprob(token, value, tuple((other, logprob) for other, logprob in top))
