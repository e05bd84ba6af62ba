"""Population evaluator: scores a whole population on ranked KV in one compiled call, budgets as numbers.

The tail of a sample is read teacher-forced through the compressed cache, all its tokens at once. If each token of the
reply is the likeliest after those before it, greedy decoding writes exactly that reply: no decoding loop is needed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kvjax.attention.dense import MASKED
from kvjax.models import Decoder
from kvjax.search.evaluators.evaluator import BLOCK, in_blocks
from kvjax.search.evaluators.ranking import RankedLayer, RankedPrompts
from kvjax.search.evaluators.scores import (
    Evaluated,
    Scores,
    check_candidates,
    in_batches,
    target_logprobs,
    weighted_scores,
)

CANDIDATES = "candidates"  # the mesh axis over which a population is split


class PopulationEvaluator:
    """Scores candidates of tokens kept with one model. Compiles once, whatever the budgets and the number of samples.

    Args:
        batch: candidates a call; fewer are padded, more take several. Made a multiple of the devices.
        devices: over which a population is split; all by default.

    Attributes:
        evaluations: candidates evaluated so far, each time on a whole set.
    """

    def __init__(self, model: Decoder, *, batch: int = 16, devices: Sequence[Any] | None = None) -> None:
        devices = devices or jax.devices()
        self._graph, self._params = nnx.split(model)
        self.layers = [layer for layer, kind in enumerate(model.config.layers) if kind.window is None]
        self._depth, self._heads = len(model.config.layers), model.config.num_kv_heads
        self._batch = -(-batch // len(devices)) * len(devices)
        if len(devices) > 1:
            mesh = Mesh(np.array(devices), (CANDIDATES,))
            self._split: Any = NamedSharding(mesh, PartitionSpec(CANDIDATES))
            self._whole: Any = NamedSharding(mesh, PartitionSpec())
        else:
            self._split = self._whole = devices[0]
        self._params = jax.device_put(self._params, self._whole)
        self.evaluations = 0

    def place(self, prompts: RankedPrompts) -> list[RankedPrompts]:
        """Blocks of `BLOCK` samples on the devices; copies of the last sample fill up its block."""
        return jax.device_put(in_blocks(prompts, prompts.samples, BLOCK), self._whole)

    def evaluate(self, candidates: Int[np.ndarray, "P L *n"], blocks: list[RankedPrompts], samples: int) -> Scores:
        """Scores of every candidate on the first `samples` samples of blocks.

        Args:
            candidates: tokens that each layer keeps, of those that do not slide, or that each of its kv heads keeps.
        """
        check_candidates(candidates, len(self.layers))
        self.evaluations += len(candidates)

        def evaluate(rows: Int[np.ndarray, "N L ..."]) -> list[Evaluated]:
            budgets = np.zeros((len(rows), self._depth, self._heads), np.int32)
            budgets[:, self.layers] = rows.reshape(*rows.shape[:2], -1)
            placed = jax.device_put(budgets, self._split)
            return [_evaluate(self._graph, self._params, block, placed) for block in blocks]

        return in_batches(evaluate, candidates, self._batch, samples)

    def close(self) -> None:
        """Frees nothing: all that an evaluator holds goes with it."""


@partial(jax.jit, static_argnums=0)
def _evaluate(
    graph: nnx.GraphDef[Decoder], params: Any, prompts: RankedPrompts, budgets: Int[Array, "P L K"]
) -> Evaluated:
    """The fields of `Scores`: [P S] each."""
    decoder = nnx.merge(graph, params)
    over_samples = jax.vmap(partial(_replay, decoder), in_axes=(0, None))
    return jax.vmap(over_samples, in_axes=(None, 0))(prompts, budgets)


def _replay(decoder: Decoder, sample: RankedPrompts, candidate: Int[Array, "L K"]) -> Evaluated:
    """One sample's tail through a cache of these budgets."""
    config, steps = decoder.config, sample.tail.shape[0] - 1
    positions = sample.start + jnp.arange(steps)
    x = decoder.embed(sample.tail[:-1])
    for index, (layer, kind) in enumerate(zip(decoder.layers, config.layers, strict=True)):
        held = sample.layers[index]
        entries = candidate[index] if kind.window is None else jnp.full_like(candidate[index], held.order.shape[1])
        attend = partial(_attend, held, positions, entries, scale=config.query_scale, window=kind.window)
        x = layer(x, positions, attend)
    logprobs = jnp.concatenate([sample.first[None], target_logprobs(decoder.head(x), sample.tail[1:])])
    return weighted_scores(logprobs, sample.weight)


def _attend(
    held: RankedLayer,
    positions: Int[Array, "R"],
    entries: Int[Array, "K"],
    q: Float[Array, "R H D"],
    k: Float[Array, "R K D"],
    v: Float[Array, "R K D"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "R H D"]:
    """Exact attention of the tail's tokens to the first `entries` of what is held and, causally, to each other."""
    steps, heads, head_dim = q.shape
    kv_heads, most = held.order.shape
    rows = q.reshape(steps, kv_heads, heads // kv_heads, head_dim)
    old = jnp.einsum("rkgd,kmd->kgrm", rows, held.k, preferred_element_type=jnp.float32) * scale
    new = jnp.einsum("rkgd,skd->kgrs", rows, k, preferred_element_type=jnp.float32) * scale
    sees_old = jnp.broadcast_to(
        ((held.order >= 0) & (jnp.arange(most) < entries[:, None]))[:, None], (kv_heads, steps, most)
    )
    sees_new = jnp.tril(jnp.ones((steps, steps), bool))
    if window is not None:
        sees_old &= held.order[:, None] > positions[:, None] - window
        sees_new &= positions[None] > positions[:, None] - window
    scores = jnp.concatenate([jnp.where(sees_old[:, None], old, MASKED), jnp.where(sees_new, new, MASKED)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("kgrm,kmd->rkgd", weights[..., :most], held.v, preferred_element_type=jnp.float32)
    out += jnp.einsum("kgrs,skd->rkgd", weights[..., most:], v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)
