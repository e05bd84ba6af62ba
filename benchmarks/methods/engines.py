"""Engines of `benchmarks.methods`: as few as can be, and none prefills a prompt that another has prefilled.

Neither changes an answer. The full KV of a prompt does not depend on the method, so all engines of a run share a store
of it; and a budget is asked of the engine of a larger one only where that has, for it, the plans of an engine of its
own.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax

from benchmarks.methods.cell import Cell
from kvjax.budget import LEAST_TOKEN_BUDGET, MAX_GROUP_LAYERS
from kvjax.engine import EngineConfig
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from kvjax.models import DecoderConfig, read_config
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS

CHUNK = BLOCK_TOKENS  # tokens: what follows the last whole chunk of a stored prompt is computed, so chunks are small
MARGIN = 256  # tokens beyond a sample's length: answers in several turns may be longer than the right ones
HOST = 1 << 29  # bytes that blocks pass through, and of the newest conversations


@dataclasses.dataclass(frozen=True)
class Engines:
    """Settings of all engines of a run.

    Attributes:
        folder: of the model.
        headroom: of a view, for generated tokens.
        slots: samples asked at once.
        store: a folder for the KV of prompts, and the bytes it may take; None reads every prompt anew.
    """

    folder: pathlib.Path
    headroom: int
    slots: int
    store: tuple[pathlib.Path, int] | None = None

    def config(self, cell: Cell) -> EngineConfig:
        """Of an engine for one cell. Layers are prefilled together: memory is no matter here, and time is."""
        store = None
        if self.store is not None:
            disk, size = self.store
            store = StoreConfig(
                host_cache_size=HOST, disk_cache=disk, disk_cache_size=size, prefetch_policy="wait_complete"
            )
        return EngineConfig(
            max_model_len=min(cell.length + MARGIN, self._model.max_position),
            max_num_seqs=self.slots,
            prefill_chunk_size=CHUNK,
            method=cell.arm,
            token_budget=cell.budget,
            headroom=self.headroom,
            store=store,
            group_layers=MAX_GROUP_LAYERS,
        )

    def keeping(self, prompts: int, lengths: Sequence[int], disk: pathlib.Path) -> "Engines":
        """The same with a store in folder `disk` for so many prompts of each length.

        Twice what they take: the turns of a conversation differ in what each method said to the former ones.
        """
        tokens = sum(-(-(length + MARGIN) // CHUNK) * CHUNK for length in lengths)
        size = 2 * prompts * self.caches(Cell("full", None, min(lengths))).full_bytes(tokens)
        return dataclasses.replace(self, store=(disk, size))

    def caches(self, cell: Cell) -> CacheConfig:
        """The cache config of an engine for one cell. Raises ValueError where the method refuses the budget."""
        layout = ResolvedConfig.resolve(self.config(cell), self._model.max_position, jax.default_backend())
        return CacheConfig.declare(self._model, layout)

    def shared(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells that each engine measures, in their order. It has the largest budget of them."""
        engines = []
        for arm, length in dict.fromkeys((cell.arm, cell.length) for cell in cells):
            left = [cell for cell in cells if (cell.arm, cell.length) == (arm, length)]
            while left:
                largest = max(left, key=lambda cell: cell.budget or 0)
                served = [cell for cell in left if cell == largest or self._serves(largest, cell)]
                engines.append(served)
                left = [cell for cell in left if cell not in served]
        return sorted(engines, key=lambda served: cells.index(served[0]))

    def equal(self, cell: Cell) -> Cell | None:
        """The largest budget of `rocketkv` that reads no more bytes a step than this cell does; None if there is none.

        Raises:
            ValueError: the cell's method refuses its budget.
        """
        most = self.caches(cell).read_bytes(cell.length)
        for budget in range(2 * (cell.budget or cell.length), LEAST_TOKEN_BUDGET - 1, -1):
            other = Cell("rocketkv", budget, cell.length)
            try:
                if self.caches(other).read_bytes(cell.length) <= most:
                    return other
            except ValueError:
                return None  # and smaller ones are refused as well
        return None

    def _serves(self, largest: Cell, cell: Cell) -> bool:
        try:
            return self.caches(largest).within(cell.budget).plans == self.caches(cell).plans
        except ValueError:
            return False

    @functools.cached_property
    def _model(self) -> DecoderConfig:
        return read_config(self.folder)
