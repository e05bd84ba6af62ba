"""Runner: one model's arrays on the device and the compiled steps over them. It knows slots, no requests and no store.

All calls return at once (JAX dispatches asynchronously); reading a result waits for it. Not safe for use
from several threads: the engine's thread owns the runner.
"""

import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from kvjax import cache
from kvjax.attention.methods import LayerCacheConfig
from kvjax.cache import View, Workspace
from kvjax.engine.device import steps
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.engine.device.occupancy import Occupancy
from kvjax.engine.device.prefill import Prefill
from kvjax.engine.device.row_invariance import agreeing_sizes
from kvjax.engine.device.sampling import SamplerState, TokenSample
from kvjax.engine.device.split_model import SplitModel
from kvjax.models import Decoder

EXTENSION = 64  # most tokens behind a selection that are read in one dispatch
LOADED = 8  # blocks that are copied to a workspace at once, where there are so many
HostBlocks = Sequence[tuple[Num[np.ndarray, "K C D"], Num[np.ndarray, "K C D"]]]  # K and V of one chunk, in equal parts


class Runner:
    """One model, its views and its compiled steps.

    Args:
        decoder: weights placed where they stay (sharded over `mesh`'s axis "tensor" if there is one).
        caches: what each layer retains of a sequence, and in which arrays.

    Attributes:
        model: the decoder, split.
        views: one a layer, of all slots; `state` is what decode steps carry beside them.
        occupancy: entries of the slots' views, counted on the host.
        sizes: tokens that a unit of a prefill may have, in increasing order; after `warm_up` those that agree.
    """

    def __init__(self, decoder: Decoder, caches: CacheConfig, mesh: Mesh | None = None) -> None:
        self.caches = caches
        self.layout = caches.layout
        self.mesh = mesh
        self.vocab_size = decoder.config.vocab_size
        self.groups = caches.groups
        self.model = SplitModel.of(decoder, mesh, self.layout.implementation)
        self._state_specs = steps.DecodeState.declare(self.layout.max_num_seqs, self.vocab_size)
        self.views: tuple[View, ...] = cache.allocate(caches.views, mesh)
        self.state: steps.DecodeState = cache.allocate(self._state_specs, mesh)
        self.sizes = self.layout.candidate_sizes
        self.occupancy = Occupancy(caches.plans, self.layout.max_num_seqs)
        self._workspaces: tuple[int, list[list[Workspace]]] = (0, [])

    def workspaces(self, bucket: int, group: int) -> list[Workspace]:
        """Those of a layer group, one a layer: two sets are used in turn, and only the last bucket's are there."""
        if self._workspaces[0] != bucket:
            self._workspaces = (0, [])  # free the old ones first
            specs = [self.caches.workspace(bucket)] * max(len(group) for group in self.groups)
            self._workspaces = (bucket, [cache.allocate(specs, self.mesh) for _ in self.groups[:2]])
        return self._workspaces[1][group % 2]

    def begin(
        self,
        prompt: Int[np.ndarray, "N"],
        slot: int,
        compress_after: int | None = None,
        *,
        plans: Sequence[LayerCacheConfig] | None = None,
        turn: int | None = None,
    ) -> Prefill:
        """Starts the prefill of a prompt that will decode in `slot`.

        Args:
            compress_after: as for `CacheConfig.selected`.
            plans: those of `CacheConfig.within`, for a request with a token budget of its own.
            turn: tokens of the conversation's last turn, at the end of the prompt. It matters to methods of several
                turns, if it begins before the selection.
        """
        length = self.caches.selected(len(prompt), compress_after)
        turn_start = max(len(prompt) - turn, 0) if turn and self.caches.multi_turn else 0
        bucket = self.layout.bucket(length)
        padded = np.zeros(bucket, np.int32)
        padded[:length] = prompt[:length]
        return Prefill(
            prompt,
            length,
            slot,
            plans=self.caches.plans if plans is None else plans,
            turn_start=turn_start if turn_start < length else 0,
            sizes=self._sizes(bucket),
            num_groups=len(self.groups),
            hidden=steps.embed(self.model.trunk, self.model.trunk_leaves, padded),
        )

    def advance(self, prefill: Prefill) -> None:
        """Runs the next unit of a prefill; after a group's last unit its views are written.

        After the last group it reads the next tokens of the rest. Once it is `done`, `finish` draws the first token.
        """
        if not prefill.in_groups:
            self._extend(prefill)
            return
        workspaces = self.workspaces(prefill.bucket, prefill.group)
        start, size = prefill.units[prefill.unit]
        position, length = np.int32(start), np.int32(prefill.length)
        for place, layer in enumerate(self.groups[prefill.group]):
            prefill.hidden, workspaces[place] = steps.prefill_layer(
                self.model.kinds[layer], size, self.model.layer_leaves[layer], prefill.hidden,
                workspaces[place], position, length,
            )  # fmt: skip
        prefill.unit += 1
        if prefill.unit == len(prefill.units):
            self._write_slot(prefill, workspaces)

    def _write_slot(self, prefill: Prefill, workspaces: Sequence[Workspace]) -> None:
        """The workspaces of a group hold the prompt: what its layers retain enters the views."""
        views, slot, length = list(self.views), np.int32(prefill.slot), np.int32(prefill.length)
        for place, layer in enumerate(self.groups[prefill.group]):
            plan, limits = self.caches.plans[layer], prefill.plans[layer].limits(prefill.turn_start)
            views[layer] = steps.write_slot(
                self.model.kinds[layer], plan, views[layer], workspaces[place], slot, length, limits
            )
            self.views = tuple(views)
        prefill.unit, prefill.group = 0, prefill.group + 1
        if not prefill.in_groups:
            self.occupancy.written(prefill.slot, prefill.length, prefill.plans)

    def load_blocks(self, prefill: Prefill, place: int, blocks: HostBlocks, start: int) -> Float[Array, ""]:
        """Copies blocks from host memory to position `start` of a workspace of the prefill's group.

        Args:
            place: of the layer in its group.

        Returns:
            A scalar that is there once the device reads none of the blocks any more.
        """
        workspaces = self.workspaces(prefill.bucket, prefill.group)
        workspaces[place], copied = steps.load_blocks(self.mesh, workspaces[place], tuple(blocks), np.int32(start))
        return copied

    def slice_chunk(
        self, prefill: Prefill, group: int, place: int, start: int, size: int
    ) -> tuple[Float[Array, "K P D"], Float[Array, "K P D"]]:
        """K and V of `size` tokens at position `start` of a workspace that a group of the prefill has just filled."""
        return steps.slice_chunk(size, self.workspaces(prefill.bucket, group)[place], np.int32(start))

    def _extend(self, prefill: Prefill) -> None:
        tokens = prefill.rest[prefill.extended :][:EXTENSION]
        alone = np.arange(self.layout.max_num_seqs) == prefill.slot
        self._reselect_full(alone)
        count = self.occupancy.advance(alone, len(tokens))
        prefill.last_hidden, self.views = steps.extend(
            self.model.trunk, self.model.kinds, self.caches.plans, self.model.trunk_leaves, self.model.layer_leaves,
            self.views, np.pad(tokens, (0, EXTENSION - len(tokens))), np.int32(prefill.slot),
            np.int32(prefill.length + prefill.extended), np.int32(count),
        )  # fmt: skip
        prefill.extended += count

    def finish(self, prefill: Prefill, sampler: SamplerState, limit: int) -> TokenSample:
        """Draws the first token of a finished prefill and sets its slot decoding.

        Args:
            sampler: the slot's row of the sampler's state, from `SamplerState.of`.
            limit: how many tokens the slot may generate.

        Returns:
            The token, with a leading dimension of 1.
        """
        last = prefill.last_hidden
        if last is None:
            last = steps.rows(1, prefill.hidden, np.int32(prefill.length - 1))
        drawn, self.state = steps.first_token(
            self.model.trunk, self.model.trunk_leaves, self.state, last,
            np.int32(prefill.slot), np.int32(len(prefill.prompt)), np.int32(limit), sampler,
        )  # fmt: skip
        return drawn

    def score(self, prefill: Prefill, chunk: int) -> TokenSample:
        """Log-probabilities of the prompt's own tokens: row i belongs to token `chunk * size + i + 1`.

        Chunks are of the largest size that a unit may have.
        """
        size = prefill.sizes[-1]
        start = chunk * size
        targets = np.zeros(size, np.int32)
        following = prefill.prompt[start + 1 : min(start + 1 + size, prefill.length)]
        targets[: len(following)] = following
        hidden = steps.rows(size, prefill.hidden, np.int32(start))
        return steps.score(self.model.trunk, self.model.trunk_leaves, hidden, targets)

    def constrain(self, slot: int, allowed: UInt32[np.ndarray, "W"]) -> None:
        """Sets the tokens that a slot may draw in the next step, a bit a token: `SamplerState.allowed`."""
        self.state = steps.constrain_slot(self.state, np.int32(slot), allowed)

    def decode(self, alive: Bool[np.ndarray, "B"], count: int) -> steps.Steps:
        """Dispatches up to `count` decode steps; slots that are not `alive` stop for good.

        Fewer where a view would be full before: it is selected anew at a moment that only its own sequence decides.
        """
        self._reselect_full(alive)
        count = self.occupancy.advance(alive, count)
        out, self.views, self.state = steps.decode(
            self.model.trunk, self.model.kinds, self.caches.plans, self.layout.decode_steps, self.model.trunk_leaves,
            self.model.layer_leaves, self.views, self.state, alive, np.int32(count),
        )  # fmt: skip
        return out

    def _reselect_full(self, alive: Bool[np.ndarray, "B"]) -> None:
        """Selects anew every full view of these slots; a request that may not be selected anew ends before."""
        if self.layout.reselect:
            for layer, slot in self.occupancy.full(alive):
                self._reselect(layer, slot)
                self.occupancy.reselected(layer, slot)

    def _reselect(self, layer: int, slot: int) -> None:
        views, length = list(self.views), np.int32(self.occupancy.length[slot])
        views[layer] = steps.reselect(
            self.model.kinds[layer], self.caches.plans[layer], views[layer], np.int32(slot), length
        )
        self.views = tuple(views)

    def retained(self, slot: int) -> tuple[Int[np.ndarray, "K C"], ...]:
        """For each layer the token positions that a slot's view holds now, -1 where it is empty."""
        return tuple(np.asarray(view.positions)[slot].copy() for view in self.views)

    def warm_up(self, block_tokens: int | None = None) -> dict[str, float]:
        """Compiles every shape that serving can meet, by meeting it once. Returns the seconds of each.

        Args:
            block_tokens: of the blocks that will be copied from the host and back; None copies none.
        """
        seconds = {}
        sampler = SamplerState.greedy(self.vocab_size)
        self.constrain(0, sampler.allowed)
        for bucket in self.layout.buckets:
            began = time.monotonic()
            prefill = self.begin(np.zeros(bucket, np.int32), slot=0)
            prefill.length = prefill.sizes[-1]
            prefill.prompt = prefill.prompt[: prefill.length]
            prefill.units = tuple((0, size) for size in prefill.sizes)  # each meets every shape of its size
            while not prefill.done:
                self.advance(prefill)
            jax.block_until_ready(self.finish(prefill, sampler, limit=1))
            jax.block_until_ready(self.score(prefill, 0))
            if block_tokens is not None:
                self._warm_up_copies(prefill, min(block_tokens, bucket))
            seconds[f"prefill {bucket:,}"] = time.monotonic() - began
        self.sizes = agreeing_sizes(self.model, self.caches, self.sizes, self.mesh)
        began = time.monotonic()
        none_alive = np.zeros(self.layout.max_num_seqs, np.bool_)
        jax.block_until_ready(self.decode(none_alive, self.layout.decode_steps).emitted)
        seconds[f"decode, {self.layout.max_num_seqs} slots"] = time.monotonic() - began
        if self.caches.window:
            began = time.monotonic()
            for layer, plan in enumerate(self.caches.plans):
                if plan.eviction is not None and self.layout.reselect:
                    self._reselect(layer, slot=0)
            prefill = self.begin(np.zeros(2, np.int32), slot=0, compress_after=1)
            while not prefill.done:
                self.advance(prefill)
            jax.block_until_ready(prefill.last_hidden)
            seconds["views"] = time.monotonic() - began
        return seconds

    def _warm_up_copies(self, prefill: Prefill, block_tokens: int) -> None:
        prefill.group = 0
        for size in {block_tokens, *(size for size in prefill.sizes if size % block_tokens == 0)}:
            k, v = self.slice_chunk(prefill, 0, 0, 0, size)
        if self.layout.stores(prefill.bucket):
            parts = [np.split(np.asarray(each), size // block_tokens, axis=1) for each in (k, v)]
            for count in self.load_counts(prefill.bucket, block_tokens):
                self.load_blocks(prefill, 0, tuple(zip(*parts, strict=True))[:1] * count, 0)

    @staticmethod
    def load_counts(bucket: int, block_tokens: int) -> tuple[int, ...]:
        """Numbers of blocks that `load_blocks` takes at once, the largest first: few, for each is compiled."""
        return (LOADED, 1) if bucket >= LOADED * block_tokens else (1,)

    def _sizes(self, bucket: int) -> tuple[int, ...]:
        """Of the units of a prompt in this bucket: a short one is one unit."""
        return self.sizes if bucket >= self.layout.prefill_chunk_size else (bucket,)

    def free(self) -> None:
        """Lets go of every array on the device. No step may follow."""
        self.views, self.state, self._workspaces = (), self._state_specs, (0, [])
        self.model = self.model.without_leaves()

    def check_integrity(self) -> None:
        """Raises AssertionError if a view does not hold as many entries as it says. Waits for the device.

        What `state` says of a slot that no request holds means nothing: one may have left between two dispatches.
        """
        if self.layout.reselect:
            self.occupancy.check_integrity()
        for view in self.views:
            used, filled = np.asarray(view.used), (np.asarray(view.positions) >= 0).sum(axis=-1)
            expected = np.minimum(used, view.positions.shape[-1])[:, None]
            assert (filled == expected).all(), (used, filled)
