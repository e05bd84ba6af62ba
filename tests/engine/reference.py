"""The tiny model one token at a time, with a method's choices made by the oracle: what a compressed engine must say."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from kvjax.attention.eviction import Observation, Streaming
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import Decoder, DecoderConfig, LayerConfig, causal_attention
from tests.attention import oracle, rocketkv_oracle
from tests.engine import tiny


@dataclasses.dataclass
class Row:
    """What one head of a view holds, in order."""

    positions: list[int]
    k: np.ndarray  # [n, D]
    v: np.ndarray  # [n, D]

    def keep(self, entries: Sequence[int]) -> None:
        entries = list(entries)
        self.positions, self.k, self.v = [self.positions[i] for i in entries], self.k[entries], self.v[entries]


class Reference:
    """One sequence in one slot."""

    def __init__(self, caches: CacheConfig) -> None:
        self.config, self.plans = caches.model, caches.plans
        decoder = tiny.decoder()
        self._whole, self._parts = nnx.split(decoder), [nnx.split(layer) for layer in decoder.layers]
        self.length = 0
        self.begin = 0  # of the last turn, whose queries alone stage 1 looks from
        self.rows: list[list[Row]] = []
        self.queries: list[np.ndarray] = []  # of all positions, a layer each: [T, H, D]

    def prefill(self, tokens: Sequence[int], begin: int = 0) -> np.ndarray:
        """Reads a prompt; the logits after it [V]."""
        self.length, self.begin = len(tokens), begin
        padded = np.zeros((1, tiny.CONTEXT), np.int32)  # one shape for all prompts: nothing sees what is behind it
        padded[0, : self.length] = tokens
        x = _embed(*self._whole, padded)
        for layer, kind, plan in zip(self._parts, self.config.layers, self.plans, strict=True):
            x, *seen = _read(self.config, kind, *layer, x)
            q, k, v = (np.asarray(each)[: self.length] for each in seen)
            repeats = plan.heads(self.config.num_kv_heads, self.config.num_heads) // self.config.num_kv_heads
            self.queries.append(q)
            self.rows.append(
                [
                    Row(list(range(self.length)), k[:, h // repeats], v[:, h // repeats])
                    for h in range(k.shape[1] * repeats)
                ]
            )
            self._stage1(plan, self.rows[-1], q, k.transpose(1, 0, 2))
        return np.asarray(_head(*self._whole, np.asarray(x)[0, self.length - 1][None]))[0]

    def step(self, token: int) -> np.ndarray:
        """Appends a token; the logits after it [V]."""
        position, self.length = self.length, self.length + 1
        x = _embed(*self._whole, np.array([token], np.int32))
        for index, (layer, kind) in enumerate(zip(self._parts, self.config.layers, strict=True)):
            plan, rows = self.plans[index], self.rows[index]
            if plan.eviction is not None and len(rows[0].positions) == plan.capacity:
                self._stage1(plan, rows, self.queries[index], np.stack([row.k for row in rows]))

            at = np.array([position])
            q, k, v = (np.asarray(each)[0] for each in _project(*layer, x, at))
            self.queries[index] = np.concatenate([self.queries[index], q[None]])
            group = len(q) // len(rows)
            out = []
            for number, row in enumerate(rows):
                source = number * len(k) // len(rows)
                row.positions.append(position)
                row.k, row.v = np.vstack([row.k, k[source]]), np.vstack([row.v, v[source]])
                queries = q[number * group : (number + 1) * group]
                out += list(self._attend(plan, row, queries, kind.window))
            x = _go_on(*layer, x, at, np.stack(out)[None].astype(np.float32))
        return np.asarray(_head(*self._whole, x))[0]

    def _stage1(self, plan: LayerCacheConfig, rows: list[Row], queries: np.ndarray, k: np.ndarray) -> None:
        """`k` [K, n, D]: of the prompt, or of the rows themselves when a view is selected anew."""
        held, eviction = k.shape[1], plan.eviction
        if eviction is None or held <= plan.max_retained:
            return
        if isinstance(eviction, Streaming):
            retained = [rocketkv_oracle.streaming(held, eviction.sinks, plan.max_retained)] * len(rows)
        else:
            assert isinstance(eviction, Observation)
            observed = min(eviction.window, len(queries) - self.begin)
            retained = rocketkv_oracle.eviction(
                queries[-observed:],
                k,
                held,
                observed,
                self.config.query_scale,
                eviction.kernel,
                plan.max_retained,
                eviction.per_head,
            )
        for row, entries in zip(rows, retained, strict=True):
            row.keep(entries)

    def _attend(self, plan: LayerCacheConfig, row: Row, q: np.ndarray, window: int | None) -> np.ndarray:
        """All query heads [G, D] of one row over what stage 2 chooses for them."""
        scale, selection, held = self.config.query_scale, plan.selection, len(row.positions)
        visible = np.flatnonzero(oracle.sees(self.length - 1, np.array(row.positions), window))
        chosen = [visible.tolist()] * len(q)
        if selection is not None and held > selection.dense_threshold:
            if isinstance(selection, HybridTokens):
                scores = rocketkv_oracle.hybrid(q, row.k, selection.page_size, selection.dims)
                chosen = [rocketkv_oracle.stable_top(scores, selection.tokens)] * len(q)
            elif isinstance(selection, ExactTopK):
                scores = rocketkv_oracle.exact(q, row.k, scale)
                chosen = [rocketkv_oracle.stable_top(scores, selection.tokens)] * len(q)
            else:
                assert isinstance(selection, HybridPages | QuestSelection)
                size = selection.page_size
                keys = (
                    row.k.astype(ml_dtypes.bfloat16).astype(np.float32) if selection.half_precision_summary else row.k
                )
                shared = rocketkv_oracle.engine(q, keys, size, scale)
                scored = [
                    rocketkv_oracle.bounds_on(query, row.k, size) if isinstance(selection, QuestSelection) else shared
                    for query in q
                ]
                pages = [rocketkv_oracle.best_pages(scores, held, size, selection.tokens) for scores in scored]
                chosen = [rocketkv_oracle.entries_of(each, held, size) for each in pages]
        return np.concatenate(
            [
                rocketkv_oracle.attend(query[None], row.k, row.v, entries, scale)
                for query, entries in zip(q, chosen, strict=True)
            ]
        )


# The decoder's parts, each compiled once for prompts and once for single tokens.


@functools.partial(jax.jit, static_argnums=0)
def _embed(decoder: nnx.GraphDef[Decoder], state: nnx.State, tokens: np.ndarray) -> jax.Array:
    return nnx.merge(decoder, state).embed(jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _head(decoder: nnx.GraphDef[Decoder], state: nnx.State, x: np.ndarray | jax.Array) -> jax.Array:
    return nnx.merge(decoder, state).head(jnp.asarray(x))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(config: DecoderConfig, kind: LayerConfig, layer: nnx.GraphDef, state: nnx.State, x: jax.Array):
    """A layer over a whole prompt [1, T, E]: what leaves it, and its q [T, H, D] and k and v [T, K, D]."""
    seen, dense = [], causal_attention(config, kind)

    def attend(q, k, v):
        seen.extend(each[0] for each in (q, k, v))
        return dense(q, k, v)

    return nnx.merge(layer, state)(x, jnp.arange(x.shape[1])[None], attend), *seen


@functools.partial(jax.jit, static_argnums=0)
def _project(layer: nnx.GraphDef, state: nnx.State, x: jax.Array, position: jax.Array) -> list[jax.Array]:
    """A layer's q [1, H, D] and k and v [1, K, D] of one token."""
    seen = []

    def attend(q, k, v):
        seen.extend((q, k, v))
        return jnp.zeros_like(q)

    nnx.merge(layer, state)(x, position, attend)
    return seen


@functools.partial(jax.jit, static_argnums=0)
def _go_on(layer: nnx.GraphDef, state: nnx.State, x: jax.Array, position: jax.Array, attended: jax.Array) -> jax.Array:
    """What leaves a layer for one token whose attention gave `attended` [1, H, D]."""
    return nnx.merge(layer, state)(x, position, lambda q, k, v: attended)
