"""Runs the compiled steps on one model: owns every array on the device, and knows slots but no requests.

All calls return at once (JAX dispatches asynchronously); whoever reads a result waits for it. Not safe for use
from several threads: the engine's thread owns the runner.
"""

import logging
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax import cache
from kvjax.attention.methods import LayerCacheConfig
from kvjax.cache import View, Workspace
from kvjax.engine import steps
from kvjax.engine.caches import CacheConfig
from kvjax.engine.fill import Fill
from kvjax.engine.generation_writer import GeneratedTokens, GenerationWriters
from kvjax.engine.prefill import Prefill
from kvjax.engine.prefix import PrefixCache
from kvjax.engine.request import SamplingParams
from kvjax.engine.sampling import SamplerState, TokenSample
from kvjax.models import Decoder
from kvjax.store.keys import BLOCK_TOKENS
from kvjax.store.prefix_load import PrefixLoad

logger = logging.getLogger(__name__)
EXTENSION = 64  # most tokens behind a selection that are read in one dispatch


class Runner:
    """One model, its views and its compiled steps.

    Args:
        model: weights placed where they stay (sharded over `mesh`'s axis "tensor" if there is one).
        caches: what each layer keeps of a sequence, and in which arrays.
        prefix: KV of earlier prompts; None computes every prompt from its first token on.
    """

    def __init__(
        self, model: Decoder, caches: CacheConfig, mesh: Mesh | None = None, prefix: PrefixCache | None = None
    ) -> None:
        self.caches = caches
        self.layout = caches.layout
        self.mesh = mesh
        self.vocab_size = model.config.vocab_size
        self.groups = caches.groups
        self._split(model)
        self._state_specs = steps.DecodeState.declare(self.layout.max_num_seqs, self.vocab_size)
        self.views: tuple[View, ...] = cache.allocate(caches.views, mesh)
        self.state: steps.DecodeState = cache.allocate(self._state_specs, mesh)
        self._fill = Fill(caches.plans, self.layout.max_num_seqs)
        self.prefix = prefix
        self._answers = GenerationWriters(prefix, caches)
        self._workspaces: tuple[int, list[list[Workspace]]] = (0, [])

    @property
    def fill(self) -> Fill:
        """How full the slots' views are."""
        return self._fill

    def _split(self, model: Decoder) -> None:
        """Takes the model apart: one part a layer, equal for layers of a kind, and one for what is around them."""
        kinds, leaves, implementation = [], [], self.layout.implementation
        for layer, config in zip(model.layers, model.config.layers, strict=True):
            part, arrays = steps.Part.split(layer)
            kinds.append(steps.LayerKind(part, config.window, model.config.query_scale, self.mesh, implementation))
            leaves.append(arrays)
        known = {kind: kind for kind in kinds}  # equal kinds become one object: compared at every call
        self._kinds = tuple(known[kind] for kind in kinds)
        self._layer_leaves = tuple(leaves)
        trunk = nnx.merge(*nnx.split(model))  # the same arrays in another module
        trunk.layers = nnx.List([])
        self._trunk_leaves: tuple[jax.Array, ...]
        self._trunk, self._trunk_leaves = steps.Part.split(trunk)

    def _workspace(self, tokens: int) -> list[list[Workspace]]:
        """Two workspaces of this length, used by the groups in turn; only those of the last length are kept."""
        if self._workspaces[0] != tokens:
            self._workspaces = (0, [])  # free the old ones first
            specs = [self.caches.workspace(tokens)] * max(len(group) for group in self.groups)
            pair = [cache.allocate(specs, self.mesh) for _ in self.groups[:2]]
            self._workspaces = (tokens, pair)
        return self._workspaces[1]

    def fetch(
        self, tokens: np.ndarray, compress_after: int | None, salt: str, on_done: Callable[[], None], decoding: str = ""
    ) -> PrefixLoad | None:
        """Starts to bring what is stored of a prompt's KV to host memory; for any thread.

        Args:
            compress_after, salt: as for `begin`; `decoding` of its answer.
            on_done: called, from any thread, when nothing more will come.
        """
        tokens = self._selected(tokens, compress_after)
        if self.prefix is None or len(tokens) <= self.layout.prefill_chunk_size:
            return None
        return self.prefix.fetch(tokens, salt, on_done, decoding)

    def _selected(self, tokens: np.ndarray, compress_after: int | None) -> np.ndarray:
        return tokens[:compress_after] if compress_after and self.caches.window else tokens

    def begin(
        self,
        tokens: np.ndarray,
        slot: int,
        compress_after: int | None = None,
        salt: str = "",
        *,
        plans: Sequence[LayerCacheConfig] | None = None,
        turn: int | None = None,
        fetch: PrefixLoad | None = None,
        keep: bool = True,
        answer: GeneratedTokens | None = None,
    ) -> Prefill:
        """Starts the prefill of a prompt (`tokens` [T] int32) that will decode in `slot`.

        Args:
            compress_after: the views are selected after so many tokens, and the rest is read through them. Where no
                view chooses, that is what they do anyway.
            salt: prompts of different salts never share KV.
            plans: those of `CacheConfig.within`, for a request with a token budget of its own.
            turn: tokens of the conversation's last turn, at the end of the prompt. It matters to methods of several
                turns, if it begins before the selection.
            fetch: KV that takes the place of computing it; hidden states do not come with it. What it has not brought
                by now is not waited for. It is the prefill's from now on.
            keep: whether the store gets what is computed.
            answer: what will be generated, so that a store that keeps that as well can do so.
        """
        begin = max(len(tokens) - turn, 0) if turn and self.caches.multi_turn else 0
        tokens, rest = np.split(tokens, [len(self._selected(tokens, compress_after))])
        begin = begin if begin < len(tokens) else 0
        bucket = next(length for length in self.layout.buckets if length >= len(tokens))
        padded = np.zeros(bucket, np.int32)
        padded[: len(tokens)] = tokens
        hidden = steps.embed(self._trunk, self._trunk_leaves, padded)
        size = min(self.layout.prefill_chunk_size, bucket)
        plans = self.caches.plans if plans is None else plans
        prefill = Prefill(padded, rest, len(tokens), slot, hidden, size, len(self.groups), plans, begin, fetch=fetch)
        if self.prefix is not None and fetch is not None:
            prefill.chunk = prefill.reused = self.prefix.take(fetch)
        if self.prefix is not None and keep and (size == self.layout.prefill_chunk_size or self._answers.cache):
            prefill.saver = self.prefix.save(tokens, salt, prefill.reused, fetch, answer.decoding if answer else "")
            prefill.answer = self._answers.begin(prefill.saver.parent, prefill.prompt, prefill.length, answer)
            prefill.fetch = fetch if prefill.reused else None
        return prefill

    def advance(self, prefill: Prefill) -> None:
        """Runs the next (group, chunk) of a prefill; after a group's last chunk its views are written.

        After the last group it reads the next tokens of the rest. Once it is `done`, `finish` draws the first token.
        """
        if prefill.group == prefill.groups:
            self._extend(prefill)
            return
        workspace = self._workspace(len(prefill.tokens))[prefill.group % 2]
        size, group = prefill.size, self.groups[prefill.group]
        start, slot, length = np.int32(prefill.chunk * size), np.int32(prefill.slot), np.int32(prefill.length)
        if prefill.fetch is not None:
            prefill.fetch.renew()
        if prefill.chunk == prefill.reused:
            self._restore(prefill, workspace)
        for place, layer in enumerate(group):
            prefill.hidden, workspace[place] = steps.prefill_layer(
                self._kinds[layer], size, self._layer_leaves[layer], prefill.hidden, workspace[place], start, length
            )
        prefill.chunk += 1
        if prefill.chunk < prefill.chunks:
            return
        views = list(self.views)
        for place, layer in enumerate(group):
            plan, limits = self.caches.plans[layer], prefill.plans[layer].limits(prefill.begin)
            views[layer] = steps.write_slot(
                self._kinds[layer], plan, views[layer], workspace[place], slot, length, limits
            )
            self.views = tuple(views)
        self._keep(prefill, workspace)
        prefill.chunk, prefill.group = prefill.reused, prefill.group + 1
        if prefill.group == prefill.groups:
            self._fill.written(prefill.slot, prefill.length, prefill.plans)

    def took(self, chunk: int, began: float) -> None:
        """The store's planner is told that a chunk went through a group since `began`, by `time.monotonic`."""
        if self.prefix is not None:
            self.prefix.store.planner.computed(chunk, (time.monotonic() - began) * len(self.groups))

    def _restore(self, prefill: Prefill, workspace: list[Workspace]) -> None:
        """Puts the reused chunks of a group into its workspaces."""
        if not prefill.reused:
            return
        assert self.prefix is not None
        assert prefill.fetch is not None
        for place, layer in enumerate(self.groups[prefill.group]):
            for index, blocks in enumerate(self.prefix.chunks(prefill.fetch, layer, prefill.reused)):
                start = np.int32(index * prefill.size)
                workspace[place], prefill.restored[layer] = steps.load_blocks(
                    self.mesh, workspace[place], blocks, start
                )

    def _keep(self, prefill: Prefill, workspace: list[Workspace]) -> None:
        """Gives a finished group's new chunks to the store; after the last group later prompts will find them."""
        saver = prefill.saver
        if saver is None:
            return
        for chunk in range(saver.chunks):
            start = np.int32((prefill.reused + chunk) * prefill.size)
            for place, layer in enumerate(self.groups[prefill.group]):
                saver.put(chunk, layer, *steps.slice_chunk(prefill.size, workspace[place], start))
        self._answers.tail(prefill.answer, prefill.slot, self.groups[prefill.group], workspace, prefill.size)
        if prefill.group == prefill.groups - 1:
            saver.seal()

    def _extend(self, prefill: Prefill) -> None:
        tokens = prefill.rest[prefill.extended :][:EXTENSION]
        alone = np.arange(self.layout.max_num_seqs) == prefill.slot
        self._make_room(alone, len(tokens))
        count = self._fill.advance(alone, len(tokens))
        prefill.last, self.views = steps.extend(
            self._trunk, self._kinds, self.caches.plans, self._trunk_leaves, self._layer_leaves, self.views,
            np.pad(tokens, (0, EXTENSION - len(tokens))), np.int32(prefill.slot),
            np.int32(prefill.length + prefill.extended), np.int32(count),
        )  # fmt: skip
        prefill.extended += count

    def finish(
        self, prefill: Prefill, params: SamplingParams, stop_token_ids: tuple[int, ...], seed: int, limit: int
    ) -> TokenSample:
        """Draws the first token of a finished prefill and sets its slot decoding.

        Args:
            stop_token_ids: tokens that end the text, at most `MAX_STOP_TOKEN_IDS`.
            limit: how many tokens the slot may generate.

        Returns:
            The token, with a leading dimension of 1.
        """
        prompt = prefill.prompt
        row = SamplerState.of(params, prompt, stop_token_ids, seed, self.vocab_size)
        last = steps.rows(1, prefill.hidden, np.int32(prefill.length - 1)) if prefill.last is None else prefill.last
        drawn, self.state = steps.first_token(
            self._trunk, self._trunk_leaves, self.state, last,
            np.int32(prefill.slot), np.int32(len(prompt)), np.int32(limit), row,
        )  # fmt: skip
        return drawn

    def score(self, prefill: Prefill, chunk: int) -> TokenSample:
        """Log-probabilities of the prompt's own tokens: row i belongs to token `chunk * size + i + 1`."""
        size, start = prefill.size, chunk * prefill.size
        targets = np.zeros(size, np.int32)
        following = prefill.tokens[start + 1 : start + 1 + size]
        targets[: len(following)] = following
        return steps.score(self._trunk, self._trunk_leaves, steps.rows(size, prefill.hidden, np.int32(start)), targets)

    def decode(self, alive: np.ndarray, count: int) -> steps.Steps:
        """Dispatches up to `count` decode steps; slots that are not `alive` [B] stop for good.

        Fewer where a view would be full before: it is selected anew at a moment that only its own sequence decides.
        """
        self._make_room(alive, count)
        count = self._fill.advance(alive, count)
        out, self.views, self.state = steps.decode(
            self._trunk, self._kinds, self.caches.plans, self.layout.decode_steps, self._trunk_leaves,
            self._layer_leaves, self.views, self.state, alive, np.int32(count),
        )  # fmt: skip
        return out

    def leave(self, slot: int) -> None:
        """Whoever held the slot has ended, whichever way."""
        self._answers.leave(self.views, slot, self._fill.length[slot])

    def _make_room(self, alive: np.ndarray, count: int) -> None:
        self._answers.keep_up(self.views, self._fill.length, count)
        if not self.layout.reselect:
            return  # a request ends by itself when its headroom is used up
        for layer, slot in self._fill.full(alive):
            self._answers.gather(self.views, slot, self._fill.length[slot])
            self._reselect(layer, slot)
            self._fill.reselected(layer, slot)

    def _reselect(self, layer: int, slot: int) -> None:
        views, length = list(self.views), np.int32(self._fill.length[slot])
        views[layer] = steps.reselect(
            self._kinds[layer], self.caches.plans[layer], views[layer], np.int32(slot), length
        )
        self.views = tuple(views)

    def retained(self, slot: int) -> tuple[np.ndarray, ...]:
        """For each layer the token positions [K, C] that a slot's view holds now, -1 where it is empty."""
        return tuple(np.asarray(view.positions)[slot].copy() for view in self.views)

    def warm_up(self) -> dict[str, float]:
        """Compiles every shape that serving can meet, by meeting it once. Returns the seconds of each."""
        seconds = {}
        params = SamplingParams()
        for bucket in self.layout.buckets:
            began = time.monotonic()
            prefill = self.begin(np.zeros(bucket, np.int32), slot=0, keep=False)
            prefill.length = prefill.size  # one chunk meets every shape
            while not prefill.done:
                self.advance(prefill)
            jax.block_until_ready(self.finish(prefill, params, (), seed=0, limit=1))
            jax.block_until_ready(self.score(prefill, 0))
            if self.prefix is not None and prefill.size == self.layout.prefill_chunk_size:
                workspace = self._workspace(bucket)[0]
                k, v = steps.slice_chunk(prefill.size, workspace[0], np.int32(0))
                parts = [np.split(np.asarray(each), prefill.size // BLOCK_TOKENS, axis=1) for each in (k, v)]
                blocks = tuple(zip(*parts, strict=True))
                workspace[0], _ = steps.load_blocks(self.mesh, workspace[0], blocks, np.int32(0))
            seconds[f"prefill {bucket:,}"] = time.monotonic() - began
        began = time.monotonic()
        nobody = np.zeros(self.layout.max_num_seqs, np.bool_)
        jax.block_until_ready(self.decode(nobody, self.layout.decode_steps).emitted)
        self._answers.warm_up(self.views)
        seconds[f"decode, {self.layout.max_num_seqs} slots"] = time.monotonic() - began
        if self.caches.window:
            began = time.monotonic()
            for layer, plan in enumerate(self.caches.plans):
                if plan.eviction is not None and self.layout.reselect:
                    self._reselect(layer, slot=0)
            prefill = self.begin(np.zeros(2, np.int32), slot=0, compress_after=1, keep=False)
            while not prefill.done:
                self.advance(prefill)
            jax.block_until_ready(prefill.last)
            seconds["views"] = time.monotonic() - began
        return seconds

    def free(self) -> None:
        """Lets go of every array on the device. No step may follow."""
        self.views, self.state, self._workspaces = (), self._state_specs, (0, [])
        self._trunk_leaves, self._layer_leaves = (), ()

    def check_integrity(self) -> None:
        """Raises AssertionError if a view does not hold as many entries as it says. Waits for the device.

        What `state` says of a slot that nobody holds means nothing: its request may have left between two dispatches.
        """
        if self.prefix is not None:
            self.prefix.check_integrity()
        self._answers.check_integrity()
        if self.layout.reselect:
            self._fill.check_integrity()
        for view in self.views:
            used, filled = np.asarray(view.used), (np.asarray(view.positions) >= 0).sum(axis=-1)
            expected = np.minimum(used, view.positions.shape[-1])[:, None]
            assert (filled == expected).all(), (used, filled)
