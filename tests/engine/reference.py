"""The tiny model one token at a time, with a method's choices made by the oracle: what a compressed engine must say."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kvjax.attention.eviction import Observation, Streaming
from kvjax.attention.methods import LayerCacheConfig
from kvjax.attention.selection import ExactTopK, HybridPages, HybridTokens, QuestSelection
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import causal_attention
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
        self.config, self.decoder, self.plans = caches.model, tiny.decoder(), caches.plans
        self.length = 0
        self.begin = 0  # of the last turn, whose queries alone stage 1 looks from
        self.rows: list[list[Row]] = []
        self.queries: list[np.ndarray] = []  # of all positions, a layer each: [T, H, D]

    def prefill(self, tokens: Sequence[int], begin: int = 0) -> np.ndarray:
        """Reads a prompt; the logits after it [V]."""
        self.length, self.begin = len(tokens), begin
        x = self.decoder.embed(jnp.asarray([tokens]))
        for layer, kind, plan in zip(self.decoder.layers, self.config.layers, self.plans, strict=True):
            seen: list[np.ndarray] = []
            dense = causal_attention(self.config, kind)

            def attend(q, k, v, seen=seen, dense=dense):
                seen.extend(np.asarray(x)[0] for x in (q, k, v))
                return dense(q, k, v)

            x = layer(x, jnp.arange(self.length)[None], attend)
            q, k, v = seen
            repeats = plan.heads(self.config.num_kv_heads, self.config.num_heads) // self.config.num_kv_heads
            self.queries.append(q)
            self.rows.append(
                [
                    Row(list(range(self.length)), k[:, h // repeats], v[:, h // repeats])
                    for h in range(k.shape[1] * repeats)
                ]
            )
            self._stage1(plan, self.rows[-1], q, k.transpose(1, 0, 2))
        return np.asarray(self.decoder.head(x[0, -1:]))[0]

    def step(self, token: int) -> np.ndarray:
        """Appends a token; the logits after it [V]."""
        position, self.length = self.length, self.length + 1
        x = self.decoder.embed(jnp.asarray([token]))
        for index, (layer, kind) in enumerate(zip(self.decoder.layers, self.config.layers, strict=True)):
            plan, rows = self.plans[index], self.rows[index]
            if plan.eviction is not None and len(rows[0].positions) == plan.capacity:
                self._stage1(plan, rows, self.queries[index], np.stack([row.k for row in rows]))

            def attend(q, k, v, index=index, plan=plan, rows=rows, kind=kind):
                q, k, v = (np.asarray(x)[0] for x in (q, k, v))
                self.queries[index] = np.concatenate([self.queries[index], q[None]])
                group = len(q) // len(rows)
                out = []
                for number, row in enumerate(rows):
                    source = number * len(k) // len(rows)
                    row.positions.append(position)
                    row.k, row.v = np.vstack([row.k, k[source]]), np.vstack([row.v, v[source]])
                    queries = q[number * group : (number + 1) * group]
                    out += list(self._attend(plan, row, queries, kind.window))
                return jnp.asarray(np.stack(out)[None], jnp.float32)

            x = layer(x, jnp.asarray([position]), attend)
        return np.asarray(self.decoder.head(x))[0]

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
