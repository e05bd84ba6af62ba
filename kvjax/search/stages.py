"""Judges RocketKV's own numbers: what each layer keeps, reads a step, and pools over, as the engine's steps use them.

What a step reads depends on its query, so tails are read token by token, through the views and with the functions of
the engine. Every (candidate, sample) is a slot; what a candidate says is data of its slot, and one compile serves all.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.attention import prefill_attention, views
from kvjax.attention.eviction import Observation
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.observation import attention_received, max_pool, prompt_queries
from kvjax.attention.pages import summarize
from kvjax.attention.retention import gather, retain
from kvjax.attention.selection import HybridPages
from kvjax.cache import SlotLimits, View, Workspace
from kvjax.models import Decoder
from kvjax.search.evaluators import Evaluators
from kvjax.search.samples import Padded, RankedCase
from kvjax.search.scores import Evaluated, Scores, in_batches, target_logprobs, weighted_scores
from kvjax.search.space import Candidate

BLOCK = 4  # samples that are evaluated at a time: each takes a slot for every candidate
BOUNDS = "bfloat16"  # of the pages' summary, as the engine keeps it beside a float32 cache


@dataclasses.dataclass(frozen=True)
class Stages:
    """What all candidates share; static.

    Attributes:
        window, sinks: of stage 1.
        kernels: the widths of max-pooling that a candidate chooses from by number.
        page_size: entries of a page.
        headroom: entries of a served view that stay free for generated tokens.
    """

    window: int = 8
    sinks: int = 4
    kernels: tuple[int, ...] = (1, 7, 21, 63)
    page_size: int = 4
    headroom: int = 128

    def plan(self, longest: int, tail: int) -> LayerCacheConfig:
        """The plan under which any candidate's numbers can be followed."""
        capacity = -(-(longest + tail) // self.page_size) * self.page_size
        pages = HybridPages(capacity, self.page_size, half_precision_summary=True, dense_threshold=2 * capacity)
        return LayerCacheConfig(capacity, Observation(self.window, 1, self.sinks), longest, pages)

    def dense_threshold(self, max_retained: Any, tokens: Any) -> Any:
        """Entries up to which a served view of so many kept and read tokens is read as a whole."""
        pages = -(-(max_retained + self.headroom) // self.page_size)
        return tokens + -(-pages // 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StageReadings:
    """Prompts that were read. Leaves are arrays; see `reading.Readings`.

    Attributes:
        scores: of stage 1, for each layer and each kernel.
    """

    k: tuple[Any, ...]  # a layer: [S, K, T, D]
    v: tuple[Any, ...]  # a layer: [S, K, T, D]
    scores: tuple[Any, ...]  # a layer: [S, N, K, T]
    start: Any  # [S] int32
    tail: Any  # [S, R] int32
    weight: Any  # [S, R] float32
    first: Any  # [S, 2] float32


class StageEvaluators(Evaluators):
    """For candidates of three numbers a layer, one after another: tokens kept, tokens read, number of the kernel.

    Args:
        longest, tail: tokens to which prompts and tails are padded.
        batch: candidates a call.

    Raises:
        ValueError: a layer of the model slides: its ring has no pages.
    """

    def __init__(self, model: Decoder, stages: Stages, longest: int, tail: int, *, batch: int = 8) -> None:
        if any(kind.window is not None for kind in model.config.layers):
            raise ValueError("this model has sliding layers, and RocketKV's stages are searched in all layers alike")
        self._graph, self._params = nnx.split(model)
        self._stages, self._longest, self._tail, self._batch = stages, longest, tail, batch
        self._plan, self._layers = stages.plan(longest, tail), model.config.num_layers

    @property
    def full(self) -> Candidate:
        return (self._longest, self._plan.capacity, 0) * self._layers

    def read(self, cases: Sequence[RankedCase]) -> list[StageReadings]:
        """Prefills every prompt, in blocks of `BLOCK`; the last is filled up with copies."""
        blocks, fewest = [], self._stages.window + self._stages.sinks
        for begin in range(0, len(cases), BLOCK):
            some = list(cases[begin : begin + BLOCK])
            some += some[-1:] * (BLOCK - len(some))
            padded = Padded.of(some, fewest=fewest, longest=self._longest, tail=self._tail)
            read = [
                _prefill(self._graph, self._stages, self._params, *one)
                for one in zip(padded.prompt, padded.length, padded.tail[:, 0], strict=True)
            ]
            k, v, scores, first = jax.tree.map(lambda *one: jnp.stack(one), *read)
            start, tails, weight = (jnp.asarray(x) for x in (padded.length, padded.tail, padded.weight))
            blocks.append(StageReadings(k, v, scores, start, tails, weight, first))
        return blocks

    def evaluate(self, candidates: Int[np.ndarray, "P N"], read: list[StageReadings], samples: int) -> Scores:
        static = self._graph, self._stages, self._plan

        def evaluate(some: Int[np.ndarray, "N L 3"]) -> list[Evaluated]:
            return [_evaluate(*static, self._params, block, some) for block in read]

        return in_batches(evaluate, candidates.reshape(-1, self._layers, 3).astype(np.int32), self._batch, samples)

    def entropy(self, read: list[StageReadings]) -> Float[np.ndarray, "L"]:
        """Zeros: nothing that searches these numbers asks for it."""
        return np.zeros(self._layers)


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    stages: Stages,
    params: Any,
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    following: Int[Array, ""],
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...], Float[Array, "2"]]:
    """One prompt through the model: K, V and scores by kernel of each layer, and what it says of the next token."""
    decoder = nnx.merge(graph, params)
    scale, places = decoder.config.query_scale, jnp.arange(len(tokens))
    found: list[tuple[Array, Array, Array]] = []

    def attend(q: Float[Array, "T H D"], k: Float[Array, "T K D"], v: Float[Array, "T K D"]) -> Float[Array, "T H D"]:
        k, v = (source.transpose(1, 0, 2) for source in (k, v))
        window = jnp.int32(stages.window)
        received = attention_received(prompt_queries(q, length, stages.window), k, length, window, scale=scale)
        pooled = jnp.stack([max_pool(received, kernel, length - window) for kernel in stages.kernels])
        found.append((k, v, jnp.where(places < stages.sinks, jnp.inf, pooled)))
        return prefill_attention(q, k, v, jnp.int32(0), scale=scale)

    x = decoder.embed(tokens)
    for layer in decoder.layers:
        x = layer(x, places, attend)
    first = target_logprobs(decoder.head(jnp.take(x, length - 1, axis=0)), following)
    k, v, scores = zip(*found, strict=True)
    return k, v, scores, first


@partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    graph: nnx.GraphDef[Decoder],
    stages: Stages,
    plan: LayerCacheConfig,
    params: Any,
    block: StageReadings,
    candidates: Int[Array, "P L 3"],
) -> Evaluated:
    """The fields of `Scores`: [P S] each."""
    decoder = nnx.merge(graph, params)
    count, samples = len(candidates), len(block.start)
    slots = count * samples
    held = tuple(_view(stages, plan, block, layer, candidates[:, layer]) for layer in range(candidates.shape[1]))
    tail, start = jnp.tile(block.tail, (count, 1)), jnp.tile(block.start, count)
    active, scale = jnp.ones(slots, bool), decoder.config.query_scale

    def step(caches: tuple[View, ...], index: Int[Array, ""]) -> tuple[tuple[View, ...], Array]:
        position, x, new = start + index, decoder.embed(tail[:, index]), []
        for layer, view in zip(decoder.layers, caches, strict=True):

            def attend(q: Array, k: Array, v: Array, view: View = view) -> Array:
                new.append(views.append(plan, view, q, k, v, position, active))
                return views.attend(plan, new[-1], q, position, active, scale=scale, window=None)

            x = layer(x, position, attend)
        return tuple(new), target_logprobs(decoder.head(x), tail[:, index + 1])

    _, logprobs = jax.lax.scan(step, held, jnp.arange(tail.shape[1] - 1))
    first = jnp.tile(block.first, (count, 1))
    logprobs = jnp.concatenate([first[:, None], logprobs.transpose(1, 0, 2)], axis=1)
    return weighted_scores(logprobs.reshape(count, samples, -1, 2), block.weight)


def _view(stages: Stages, plan: LayerCacheConfig, block: StageReadings, layer: int, rows: Int[Array, "P 3"]) -> View:
    """One layer's view for every candidate and sample: slot `p * S + s`."""

    def one(row: Int[Array, "3"], k: Array, v: Array, scores: Array, length: Array) -> View:
        recent = jnp.int32(stages.window)
        positions = retain(
            scores[row[2]], length, recent, max_retained=plan.max_retained, capacity=plan.capacity, budget=row[0]
        )
        return gather(Workspace(k, v), positions)

    over_samples = jax.vmap(one, in_axes=(None, 0, 0, 0, 0))
    arguments = (block.k[layer], block.v[layer], block.scores[layer], block.start)
    view = jax.vmap(over_samples, in_axes=(0, None, None, None, None))(rows, *arguments)
    view = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), view)  # [P, S, 1, ...]
    numbers = jnp.repeat(rows, len(block.start), axis=0)
    limits = SlotLimits(
        numbers[:, 0], numbers[:, 1], stages.dense_threshold(numbers[:, 0], numbers[:, 1]), 0 * numbers[:, 0]
    )
    bounds = summarize(view.k, view.positions >= 0, stages.page_size, BOUNDS)
    return dataclasses.replace(view, bounds=bounds, limits=limits)


def split(context: int, traffic: int, exponent: float, stages: Stages) -> tuple[int, int]:
    """Tokens kept and tokens read of one layer whose steps read `traffic` tokens' worth, by RocketKV's exponent.

    Stage 1 takes `(context / traffic) ** exponent` of the compression; the pages' summaries are paid for out of the
    traffic, two pages for one token, and what is left is read exactly, at least two pages.

    Raises:
        ValueError: the traffic pays for no page.
    """
    page = stages.page_size
    if traffic < 2 * page + 1:
        raise ValueError(f"traffic={traffic} pays for fewer than two pages of {page} entries: raise it")
    retained = math.floor(context / max(context / traffic, 1.0) ** exponent)
    most = 2 * (traffic - 2 * page) * page  # entries whose summaries leave two pages to read
    capacity = max(min(retained, most, context), stages.window + stages.sinks + stages.headroom)
    summaries = math.ceil(math.ceil(capacity / page) / 2)
    tokens = (traffic - summaries) // page * page
    if tokens < 2 * page:
        raise ValueError(
            f"traffic={traffic} does not pay for the summaries of {capacity} entries and two pages: raise it, or lower "
            f"headroom={stages.headroom}"
        )
    return capacity - stages.headroom, tokens
