"""Prompts read once: the KV of each layer in the order in which it would be kept, so that a budget is a number.

Whatever the budgets, the prompt is prefilled densely and its tokens are ranked by stage 1. Kept in order of rank, the
first `k` entries of a layer are its view of `k` tokens: a candidate is data, and one compiled function evaluates them all.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.attention import prefill_attention
from kvjax.attention.eviction import Eviction, PromptState
from kvjax.attention.observation import prompt_queries
from kvjax.models import Decoder
from kvjax.search.samples import Padded, RankedCase
from kvjax.search.scores import target_logprobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReading:
    """One layer's KV of each sample, the entry to be kept first at the front. Leaves are arrays.

    Attributes:
        order: places of the entries in the prompt, by which a sliding window is kept; -1 behind the prompt.
    """

    k: Any  # [S, K, M, D]
    v: Any  # [S, K, M, D]
    order: Any  # [S, K, M] int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readings:
    """All that evaluating a candidate needs of a set of samples. Leaves are arrays.

    Attributes:
        layers: one a layer of the model.
        start: tokens of each prompt, that is the position of the first token of its tail.
        tail: tokens that are read through the compressed cache, padded.
        weight: 1 for the tokens of the reply, which count; 0 for the question and padding.
        first: the logarithm of the probability of the tail's first token, and 1 if none is likelier. It comes out of
            the prefill, before anything is compressed.
        entropy: of the attention that the window pays to the prompt, in nats, a mean over heads; one a layer.
    """

    layers: tuple[LayerReading, ...]
    start: Any  # [S] int32
    tail: Any  # [S, R] int32
    weight: Any  # [S, R] float32
    first: Any  # [S, 2] float32
    entropy: Any  # [S, L] float32

    @property
    def samples(self) -> int:
        return self.tail.shape[0]


class Reader:
    """Reads cases with one model. Compiles once for each length of prompts.

    Args:
        eviction: ranks the tokens of a prompt in the layers that do not slide.
        ceiling: most entries that a layer will ever keep: what lies behind is dropped at once.
    """

    def __init__(self, model: Decoder, eviction: Eviction, ceiling: int) -> None:
        if eviction.per_head:
            raise ValueError(f"{eviction} keeps tokens for each query head: budgets are searched for each kv head")
        self._graph, self._params = nnx.split(model)
        self.config, self._stage1, self._ceiling = model.config, eviction, ceiling

    def read(self, cases: Sequence[RankedCase], length: int | None = None, tail: int | None = None) -> Readings:
        """Prefills every prompt, one after another.

        Args:
            length, tail: tokens to which prompts and tails are padded; the longest of the cases where not given.

        Raises:
            ValueError: a prompt is shorter than the tokens that stage 1 always keeps, or longer than `length`.
        """
        length = length or max(len(case.prompt) for case in cases)
        tail = tail or max(len(case.tail) for case in cases)
        padded = Padded.of(cases, fewest=self._stage1.min_retained, longest=length, tail=tail)
        static = self._graph, self._stage1, self._ceiling
        read = [
            _prefill(*static, self._params, *one)
            for one in zip(padded.prompt, padded.length, padded.tail[:, 0], strict=True)
        ]
        layers, first, entropy = jax.tree.map(lambda *one: jnp.stack(one), *read)
        start, tails, weight = (jnp.asarray(x) for x in (padded.length, padded.tail, padded.weight))
        return Readings(layers, start, tails, weight, first, entropy)


@partial(jax.jit, static_argnums=1)
def streaming_order(readings: Readings, sinks: int) -> Readings:
    """What was read, put in the order in which StreamingLLM would keep it: the first `sinks` tokens, then the last."""

    def reordered(held: LayerReading) -> LayerReading:
        last = held.order.shape[-1]
        first = jnp.where(held.order < sinks, held.order - last, -held.order)
        at = jnp.argsort(jnp.where(held.order < 0, last, first), axis=-1)
        k, v = (jnp.take_along_axis(x, at[..., None], axis=2) for x in (held.k, held.v))
        return LayerReading(k, v, jnp.take_along_axis(held.order, at, axis=2))

    return dataclasses.replace(readings, layers=tuple(map(reordered, readings.layers)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    eviction: Eviction,
    ceiling: int,
    params: Any,
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    following: Int[Array, ""],
) -> tuple[tuple[LayerReading, ...], Float[Array, "2"], Float[Array, "L"]]:
    """One prompt through the model: its KV in order of rank, what it says of the next token, and entropies."""
    decoder = nnx.merge(graph, params)
    config, places = decoder.config, jnp.arange(len(tokens))
    layers, entropies, x = [], [], decoder.embed(tokens)
    for layer, kind in zip(decoder.layers, config.layers, strict=True):

        def attend(
            q: Float[Array, "T H D"],
            k: Float[Array, "T K D"],
            v: Float[Array, "T K D"],
            window: int | None = kind.window,
        ) -> Float[Array, "T H D"]:
            k, v = (source.transpose(1, 0, 2) for source in (k, v))
            recent = eviction.window
            queries = prompt_queries(q, length, recent)
            scores = eviction.score(PromptState(queries, k, v, length, scale=config.query_scale))
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
            layers.append(LayerReading(entries[0], entries[1], order))
            return prefill_attention(q, k, v, jnp.int32(0), scale=config.query_scale, window=window)

        x = layer(x, places, attend)
    first = target_logprobs(decoder.head(jnp.take(x, length - 1, axis=0)), following)
    return tuple(layers), first, jnp.stack(entropies)


def _entropy(scores: Float[Array, "K T"]) -> Float[Array, ""]:
    """Of stage 1's scores as a distribution over tokens, in nats; flat ones call for a large budget."""
    mass = jnp.where(jnp.isfinite(scores), jnp.maximum(scores, 0), 0)  # a sink's score is infinite
    shares = mass / jnp.maximum(jnp.sum(mass, axis=1, keepdims=True), 1e-30)
    return jnp.mean(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-30)), axis=1))
