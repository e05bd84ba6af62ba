"""Prefill of sample prompts: each through the model once, densely, with an observer of every layer's queries and KV."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.attention import prefill_attention
from kvjax.models import Decoder
from kvjax.search.evaluators.scores import target_logprobs
from kvjax.search.samples import Padded, RankedCase

Observe = Callable[[Array, Array, Array, int | None], None]  # q [T H D], k and v [K T D], a sliding layer's window


def prefill(
    decoder: Decoder, tokens: Int[Array, "T"], length: Int[Array, ""], following: Int[Array, ""], observe: Observe
) -> Float[Array, "2"]:
    """Runs one padded prompt, and calls `observe` in every layer, from the bottom up.

    Args:
        length: tokens of the prompt that are real.
        following: the token after the prompt.

    Returns:
        The log-probability of `following`, and 1 if no token is likelier.
    """
    scale, places, x = decoder.config.query_scale, jnp.arange(len(tokens)), decoder.embed(tokens)
    for layer, kind in zip(decoder.layers, decoder.config.layers, strict=True):

        def attend(
            q: Float[Array, "T H D"],
            k: Float[Array, "T K D"],
            v: Float[Array, "T K D"],
            window: int | None = kind.window,
        ) -> Float[Array, "T H D"]:
            k, v = (source.transpose(1, 0, 2) for source in (k, v))
            observe(q, k, v, window)
            return prefill_attention(q, k, v, jnp.int32(0), scale=scale, window=window)

        x = layer(x, places, attend)
    return target_logprobs(decoder.head(jnp.take(x, length - 1, axis=0)), following)


def prefill_cases(
    prefill_one: Callable[[Any, Any, Any], Any],
    cases: Sequence[RankedCase],
    *,
    shortest: int,
    length: int | None,
    tail: int | None,
) -> tuple[Any, tuple[Int[Array, "S"], Int[Array, "S R"], Float[Array, "S R"]]]:
    """Prefills cases one after another, and stacks what each gives.

    Args:
        prefill_one: of a prompt's tokens [T], its length, and the token after it.
        shortest: tokens that a prompt must have.
        length, tail: tokens to which prompts and tails are padded; those of the longest case where not given.

    Returns:
        The stacked trees; and for each sample the position of its tail, the tail's tokens, and their weights.

    Raises:
        ValueError: a prompt is shorter than `shortest`, or longer than `length`.
    """
    length = length or max(len(case.prompt) for case in cases)
    tail = tail or max(len(case.tail) for case in cases)
    padded = Padded.of(cases, shortest=shortest, longest=length, tail=tail)
    trees = [prefill_one(*one) for one in zip(padded.prompt, padded.length, padded.tail[:, 0], strict=True)]
    start, tails, weight = (jnp.asarray(x) for x in (padded.length, padded.tail, padded.weight))
    return jax.tree.map(lambda *one: jnp.stack(one), *trees), (start, tails, weight)
