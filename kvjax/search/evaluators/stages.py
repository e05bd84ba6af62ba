"""Stage evaluator: scores RocketKV's own numbers, what each layer keeps, reads a step, and pools over.

What a step reads depends on its query, so tails are read token by token, through the views and with the functions of
the engine. Every (candidate, sample) is a slot; a candidate's numbers are data of its slot, and one compile serves all.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from kvjax.attention import views
from kvjax.attention.eviction import Observation
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.observation import attention_received, max_pool, prompt_queries
from kvjax.attention.pages import summarize
from kvjax.attention.retention import gather, retain
from kvjax.attention.selection import HybridPages
from kvjax.cache import SlotLimits, View, Workspace
from kvjax.models import Decoder
from kvjax.search.evaluators.evaluator import in_blocks
from kvjax.search.evaluators.prefill import prefill, prefill_cases
from kvjax.search.evaluators.scores import Evaluated, Scores, in_batches, target_logprobs, weighted_scores
from kvjax.search.samples import RankedCase
from kvjax.search.spaces.rocketkv import Stages

BLOCK = 4  # samples that are evaluated at a time: each takes a slot for every candidate
BOUNDS = "bfloat16"  # of the pages' summary, as the engine keeps it beside a float32 cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StagePrompts:
    """Prefilled prompts with stage 1's scores. Leaves are arrays; fields that `RankedPrompts` has too are as there.

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

    @property
    def entropy(self) -> Float[np.ndarray, "S L"]:
        """Zeros: no allocator that searches these numbers needs it."""
        return np.zeros((self.tail.shape[0], len(self.k)))


class StageReader:
    """Prefills prompts, and scores their tokens with every kernel.

    Raises:
        ValueError: a layer of the model slides: its ring has no pages.
    """

    def __init__(self, model: Decoder, stages: Stages) -> None:
        if any(kind.window is not None for kind in model.config.layers):
            raise ValueError("this model has sliding layers, and RocketKV's stages are searched in all layers alike")
        self._graph, self._params = nnx.split(model)
        self._stages = stages

    def read(self, cases: Sequence[RankedCase], length: int | None = None, tail: int | None = None) -> StagePrompts:
        """Prefills every prompt, one after another; `length` and `tail` are as `RankedReader.read` has them."""
        prefill_one = partial(_prefill, self._graph, self._stages, self._params)
        shortest = self._stages.window + self._stages.sinks
        trees, tails = prefill_cases(prefill_one, cases, shortest=shortest, length=length, tail=tail)
        k, v, scores, first = trees
        return StagePrompts(k, v, scores, *tails, first)


class StageEvaluator:
    """Scores candidates of three numbers a layer: tokens kept, tokens read, number of the kernel.

    Args:
        batch: candidates a call.
    """

    def __init__(self, model: Decoder, stages: Stages, *, batch: int = 8) -> None:
        self._graph, self._params = nnx.split(model)
        self._stages, self._batch = stages, batch

    def place(self, prompts: StagePrompts) -> list[StagePrompts]:
        """Blocks of `BLOCK` samples; copies of the last sample fill up its block."""
        return in_blocks(prompts, len(prompts.tail), BLOCK)

    def evaluate(self, candidates: Int[np.ndarray, "P L 3"], blocks: list[StagePrompts], samples: int) -> Scores:
        """Scores of every candidate on the first `samples` samples of blocks."""

        def evaluate(rows: Int[np.ndarray, "N L 3"]) -> list[Evaluated]:
            return [_evaluate(self._graph, self._stages, self._params, block, rows) for block in blocks]

        return in_batches(evaluate, candidates.astype(np.int32), self._batch, samples)

    def close(self) -> None:
        """Frees nothing: all that an evaluator holds goes with it."""


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: nnx.GraphDef[Decoder],
    stages: Stages,
    params: Any,
    tokens: Int[Array, "T"],
    length: Int[Array, ""],
    following: Int[Array, ""],
) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...], Float[Array, "2"]]:
    """One prompt: K, V and scores by kernel of each layer, and the scores of the token that follows."""
    decoder = nnx.merge(graph, params)
    places, window = jnp.arange(len(tokens)), jnp.int32(stages.window)
    observed: list[tuple[Array, Array, Array]] = []

    def observe(q: Float[Array, "T H D"], k: Float[Array, "K T D"], v: Float[Array, "K T D"], _: int | None) -> None:
        queries = prompt_queries(q, length, stages.window)
        received = attention_received(queries, k, length, window, scale=decoder.config.query_scale)
        pooled = jnp.stack([max_pool(received, kernel, length - window) for kernel in stages.kernels])
        observed.append((k, v, jnp.where(places < stages.sinks, jnp.inf, pooled)))

    first = prefill(decoder, tokens, length, following, observe)
    k, v, scores = zip(*observed, strict=True)
    return k, v, scores, first


def _cache_config(stages: Stages, block: StagePrompts) -> LayerCacheConfig:
    """A layer of which any candidate's numbers can be followed as data."""
    longest, tail = block.k[0].shape[2], block.tail.shape[1]
    capacity = -(-(longest + tail) // stages.page_size) * stages.page_size
    pages = HybridPages(capacity, stages.page_size, half_precision_summary=True, dense_threshold=2 * capacity)
    return LayerCacheConfig(capacity, Observation(stages.window, 1, stages.sinks), longest, pages)


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(
    graph: nnx.GraphDef[Decoder],
    stages: Stages,
    params: Any,
    block: StagePrompts,
    candidates: Int[Array, "P L 3"],
) -> Evaluated:
    """The fields of `Scores`: [P S] each."""
    decoder, cache = nnx.merge(graph, params), _cache_config(stages, block)
    count, samples = len(candidates), len(block.start)
    slots = count * samples
    held = tuple(_view(stages, cache, block, layer, candidates[:, layer]) for layer in range(candidates.shape[1]))
    tail, start = jnp.tile(block.tail, (count, 1)), jnp.tile(block.start, count)
    active, scale = jnp.ones(slots, bool), decoder.config.query_scale

    def step(caches: tuple[View, ...], index: Int[Array, ""]) -> tuple[tuple[View, ...], Array]:
        position, x, new = start + index, decoder.embed(tail[:, index]), []
        for layer, view in zip(decoder.layers, caches, strict=True):

            def attend(q: Array, k: Array, v: Array, view: View = view) -> Array:
                new.append(views.append(cache, view, q, k, v, position, active))
                return views.attend(cache, new[-1], q, position, active, scale=scale, window=None)

            x = layer(x, position, attend)
        return tuple(new), target_logprobs(decoder.head(x), tail[:, index + 1])

    _, logprobs = jax.lax.scan(step, held, jnp.arange(tail.shape[1] - 1))
    first = jnp.tile(block.first, (count, 1))
    logprobs = jnp.concatenate([first[:, None], logprobs.transpose(1, 0, 2)], axis=1)
    return weighted_scores(logprobs.reshape(count, samples, -1, 2), block.weight)


def _view(stages: Stages, cache: LayerCacheConfig, block: StagePrompts, layer: int, rows: Int[Array, "P 3"]) -> View:
    """One layer's view for every candidate and sample: slot `p * S + s`."""

    def one(row: Int[Array, "3"], k: Array, v: Array, scores: Array, length: Array) -> View:
        recent = jnp.int32(stages.window)
        positions = retain(
            scores[row[2]], length, recent, max_retained=cache.max_retained, capacity=cache.capacity, budget=row[0]
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
