"""Ranked KV: prompts prefilled once, each layer's entries in the order in which stage 1 would keep them.

The first `k` entries of a layer are its view of `k` tokens, so that a budget is a number, a candidate is data, and one
compiled function evaluates all candidates.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.attention.eviction import Eviction, PromptState
from kvjax.attention.observation import prompt_queries
from kvjax.models import Decoder
from kvjax.search.evaluators.prefill import prefill, prefill_cases
from kvjax.search.samples import RankedCase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """One layer's KV of each sample, the entry to be kept first at the front. Leaves are arrays.

    Attributes:
        order: places of the entries in the prompt, by which a sliding window is kept; -1 behind the prompt.
    """

    k: Any  # [S, K, M, D]
    v: Any  # [S, K, M, D]
    order: Any  # [S, K, M] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RankedPrompts:
    """A set of samples with ranked KV, and the tails that are read after it. Leaves are arrays.

    Attributes:
        layers: one a layer of the model.
        start: tokens of each prompt, that is the position of the first token of its tail.
        tail: tokens that are read through the compressed cache, padded.
        weight: 1 for the tokens of the reply, which count; 0 for the question and padding.
        first: the logarithm of the probability of the tail's first token, and 1 if none is likelier. It comes out of
            the prefill, before anything is compressed.
        entropy: of the attention that the window pays to the prompt, in nats, a mean over heads; one a layer.
    """

    layers: tuple[RankedLayer, ...]
    start: Any  # [S] int32
    tail: Any  # [S, R] int32
    weight: Any  # [S, R] float32
    first: Any  # [S, 2] float32
    entropy: Any  # [S, L] float32

    @property
    def samples(self) -> int:
        return self.tail.shape[0]


class RankedReader:
    """Prefills and ranks prompts with one model. Compiles once for each padded length.

    Args:
        eviction: ranks the tokens of a prompt in the layers that do not slide.
        ceiling: most entries that a layer will ever keep: what lies behind is dropped at once.
    """

    def __init__(self, model: Decoder, eviction: Eviction, ceiling: int) -> None:
        if eviction.per_head:
            raise ValueError(f"{eviction} keeps tokens for each query head: budgets are searched for each kv head")
        self._graph, self._params = nnx.split(model)
        self._eviction, self._ceiling = eviction, ceiling

    def read(self, cases: Sequence[RankedCase], length: int | None = None, tail: int | None = None) -> RankedPrompts:
        """Prefills every prompt, one after another.

        Args:
            length, tail: tokens to which prompts and tails are padded; those of the longest case where not given.

        Raises:
            ValueError: a prompt is shorter than the tokens that stage 1 always keeps, or longer than `length`.
        """
        prefill_one = partial(_prefill, self._graph, self._eviction, self._ceiling, self._params)
        shortest = self._eviction.min_retained
        trees, tails = prefill_cases(prefill_one, cases, shortest=shortest, length=length, tail=tail)
        layers, first, entropy = trees
        return RankedPrompts(layers, *tails, first, entropy)


@partial(jax.jit, static_argnums=1)
def streaming_order(prompts: RankedPrompts, sinks: int) -> RankedPrompts:
    """Prompts re-ranked as StreamingLLM keeps them: the first `sinks` tokens, then the last."""

    def reordered(held: RankedLayer) -> RankedLayer:
        last = held.order.shape[-1]
        first = jnp.where(held.order < sinks, held.order - last, -held.order)
        at = jnp.argsort(jnp.where(held.order < 0, last, first), axis=-1)
        k, v = (jnp.take_along_axis(x, at[..., None], axis=2) for x in (held.k, held.v))
        return RankedLayer(k, v, jnp.take_along_axis(held.order, at, axis=2))

    return dataclasses.replace(prompts, layers=tuple(map(reordered, prompts.layers)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    eviction: Eviction,
    ceiling: int,
    params: Any,
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    following: Int[Array, ""],
) -> tuple[tuple[RankedLayer, ...], Float[Array, "2"], Float[Array, "L"]]:
    """One prompt: its ranked KV by layer, the scores of the token that follows, and entropies by layer."""
    decoder = nnx.merge(graph, params)
    places, recent = jnp.arange(len(tokens)), eviction.window
    layers: list[RankedLayer] = []
    entropies: list[Array] = []

    def rank(q: Float[Array, "T H D"], k: Float[Array, "K T D"], v: Float[Array, "K T D"], window: int | None) -> None:
        queries = prompt_queries(q, length, recent)
        scores = eviction.score(PromptState(queries, k, v, length, scale=decoder.config.query_scale))
        entropies.append(_entropy(jnp.where(places < length - recent, scores, 0)))
        if window is None:
            ranked = jnp.where(places >= length - recent, jnp.inf, scores)
            retained = min(ceiling, len(tokens))
        else:  # a sliding layer keeps its last tokens, whatever its budget
            ranked = jnp.broadcast_to(places.astype(jnp.float32), scores.shape)
            retained = min(window, len(tokens))
        values, order = jax.lax.top_k(jnp.where(places < length, ranked, -jnp.inf), retained)
        order = jnp.where(values > -jnp.inf, order, -1)
        rows = jnp.arange(len(k))[:, None]
        entries = [jnp.where(order[..., None] >= 0, source[rows, order], 0) for source in (k, v)]
        layers.append(RankedLayer(entries[0], entries[1], order))

    first = prefill(decoder, tokens, length, following, rank)
    return tuple(layers), first, jnp.stack(entropies)


def _entropy(scores: Float[Array, "K T"]) -> Float[Array, ""]:
    """Of stage 1's scores as a distribution over tokens, in nats; flat ones call for a large budget."""
    mass = jnp.where(jnp.isfinite(scores), jnp.maximum(scores, 0), 0)  # a sink's score is infinite
    shares = mass / jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), 1e-30)
    return jnp.mean(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30)), axis=1))
