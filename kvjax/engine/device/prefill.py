"""Prefill: one prompt on its way through the layers, group after group, and chunk after chunk inside a group."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.attention.methods import LayerCacheConfig


@dataclasses.dataclass(eq=False)
class Prefill:
    """State of one prefill, of which `Runner.advance` computes one unit at a time.

    Attributes:
        prompt: token ids; of these `length` come before the views are selected, and the rest is read through them.
        plans: tokens that each layer retains and reads: the runner's plans, or those of a smaller budget.
        turn_start: position at which the last turn begins; 0 where the views are chosen by whatever comes last.
        hidden: hidden states of all positions before layer group `group`, padded to the prompt's bucket of T tokens.
        reused: chunks from the first on that are not computed: their KV is loaded before each group's first unit.
        chunk: the next chunk of that group.
        extended: tokens of the rest that have been read; `last_hidden` is the hidden state of the last of them.
    """

    prompt: Int[np.ndarray, "N"]
    length: int
    slot: int
    plans: Sequence[LayerCacheConfig]
    turn_start: int
    chunk_size: int
    num_groups: int
    hidden: Float[Array, "T E"]
    reused: int = 0
    group: int = 0
    chunk: int = 0
    extended: int = 0
    last_hidden: jax.Array | None = None

    @property
    def bucket(self) -> int:
        """Tokens that its workspaces hold."""
        return self.hidden.shape[0]

    @property
    def rest(self) -> Int[np.ndarray, "M"]:
        """Tokens behind the selection; usually none."""
        return self.prompt[self.length :]

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk_size)

    @property
    def in_groups(self) -> bool:
        """True while layer groups are left to go through; behind them comes the rest of the prompt."""
        return self.group < self.num_groups

    @property
    def starts_group(self) -> bool:
        """True if the next unit is the first of a layer group."""
        return self.in_groups and self.chunk == self.reused

    @property
    def done(self) -> bool:
        return not self.in_groups and self.extended == len(self.rest)

    @property
    def progress(self) -> float:
        """The share of its units that is done."""
        units = self.chunks - self.reused
        return (self.group * units + self.chunk - self.reused) / (self.num_groups * units)

    def reuse(self, chunks: int) -> None:
        """Leaves out the first chunks, whose KV is loaded instead. Before the first unit only."""
        self.reused = self.chunk = chunks
