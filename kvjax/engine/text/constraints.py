"""Constraints: which tokens may come next, for output that has to follow a grammar.

llguidance holds the grammar and the vocabulary's trie, and tells for every state the tokens that go on with it: a mask
of a bit a token, which `kvjax.engine.device.sampling` applies behind everything else. Masks take a fraction of a
millisecond; a grammar is compiled once, and each request has a copy of its first state.
"""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from kvjax.engine.request import Constraint, ConstraintError, SamplingParams
from kvjax.engine.text.tokenizer import Tokenizer

COMPILED = 128  # grammars kept


class TokenConstraint:
    """What one request may generate, and how far it has come. Only one thread uses it at a time.

    Args:
        matcher: llguidance's, at its first state; None without a grammar.
        allowed: mask [W] of tokens that may come at any time.
        banned: token sequences whose last token may not follow the ones before.
        stops: tokens that end the text: all of them may come where the grammar is complete.
    """

    def __init__(
        self, matcher: Any, allowed: UInt32[np.ndarray, "W"], banned: Sequence[Sequence[int]], stops: Sequence[int]
    ) -> None:
        self._matcher, self._allowed, self._banned, self._stops = matcher, allowed, banned, stops
        self._tokens: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return self._matcher is not None and bool(self._matcher.is_stopped())

    def mask(self) -> UInt32[np.ndarray, "W"]:
        """A bit for each token that may come next.

        Raises:
            ConstraintError: there is none.
        """
        mask = self._allowed.copy()
        if self._matcher is not None:
            grammar = np.zeros_like(mask)
            permitted = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(mask)]
            grammar[: len(permitted)] = permitted
            if self._matcher.is_error():
                raise ConstraintError(f"the grammar could not be followed: {self._matcher.get_error()}"[:300])
            if self._matcher.is_accepting():
                for token in self._stops:
                    grammar[token // 32] |= np.uint32(1 << token % 32)
            mask &= grammar
        for sequence in self._banned:
            before = list(sequence[:-1])
            if not before or self._tokens[-len(before) :] == before:
                mask[sequence[-1] // 32] &= ~np.uint32(1 << sequence[-1] % 32)
        if not mask.any():
            raise ConstraintError("no token is left that every constraint of the request allows")
        return mask

    def accept(self, token: int) -> None:
        """The next token of the output."""
        self._tokens.append(token)
        if self._matcher is not None and token not in self._stops and not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class ConstraintCompiler:
    """Grammars of one tokenizer. Safe to use from several threads.

    Args:
        vocab_size: rows of the model's output.
        eos_token_ids: tokens that end the model's output.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._size, self._eos = tokenizer, vocab_size, tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._first_state = functools.lru_cache(COMPILED)(self._compile)

    def check(self, constraint: Constraint) -> None:
        """Compiles a grammar, so that requests need not. Slow for large ones.

        Raises:
            ConstraintError: it is not one, or uses what is not implemented; the message says what.
        """
        with self._lock:
            self._first_state(constraint)

    def of(self, params: SamplingParams, stop_token_ids: Sequence[int]) -> TokenConstraint | None:
        """That of a request; None if it may generate anything. Raises ConstraintError as `check`."""
        if not params.constrained:
            return None
        matcher = None
        if params.constraint is not None:
            with self._lock:
                matcher = self._first_state(params.constraint).deep_copy()
        allowed = np.zeros(32 * -(-self._size // 32), np.bool_)
        if params.allowed_token_ids:
            allowed[list(params.allowed_token_ids)] = True
        else:
            allowed[: self._size] = True
        banned = [
            sequence
            for word in params.bad_words
            for text in (word, f" {word.lstrip()}")
            if (sequence := self._tokenizer.encode(text, add_special_tokens=False))
        ]
        constraint = TokenConstraint(matcher, packed(allowed), banned, [t for t in stop_token_ids if t < self._size])
        constraint.mask()  # raises in the caller's thread where not even the first token exists
        return constraint

    @functools.cached_property
    def _vocabulary(self) -> Any:
        import llguidance.hf

        size = max(self._size, self._tokenizer.vocab_size)
        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer.backend, n_vocab=size, eos_token=self._eos[0] if self._eos else None
            )
        except Exception as error:  # of many kinds, for a tokenizer that it does not know
            raise ConstraintError(f"grammars are not available for this model's tokenizer: {error}") from error

    def _compile(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher, grammar_from

        try:
            matcher = LLMatcher(self._vocabulary, grammar_from(constraint.kind, constraint.source), log_level=0)
        except (ValueError, TypeError) as error:
            raise ConstraintError(f"{constraint.kind}: {error}"[:500]) from error
        if matcher.is_error():
            raise ConstraintError(f"{constraint.kind}: {matcher.get_error()}"[:500])
        return matcher


def packed(allowed: np.ndarray) -> UInt32[np.ndarray, "W"]:
    """Bits of a mask, the lowest first: token t is bit t % 32 of word t // 32."""
    return np.packbits(allowed, bitorder="little").view(np.uint32)
