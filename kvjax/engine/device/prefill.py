"""Prefill: one prompt on its way through the layers, group after group, and unit after unit inside a group."""

import dataclasses
import functools
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
        sizes: tokens that a unit may have, in increasing order; each divides the next one.
        reused: tokens from the first on that are not computed: their KV is loaded before each group's first unit.
        unit: the next unit of that group.
        extended: tokens of the rest that have been read; `last_hidden` is the hidden state of the last of them.
    """

    prompt: Int[np.ndarray, "N"]
    length: int
    slot: int
    plans: Sequence[LayerCacheConfig]
    turn_start: int
    sizes: Sequence[int]
    num_groups: int
    hidden: Float[Array, "T E"]
    reused: int = 0
    group: int = 0
    unit: int = 0
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

    @functools.cached_property
    def units(self) -> tuple[tuple[int, int], ...]:
        """Start and size of each unit of a group, in tokens; the last may stick out of the prompt."""
        return schedule(self.reused, self.length, self.sizes, self.bucket)

    @property
    def in_groups(self) -> bool:
        """True while layer groups are left to go through; behind them comes the rest of the prompt."""
        return self.group < self.num_groups

    @property
    def starts_group(self) -> bool:
        """True if the next unit is the first of a layer group."""
        return self.in_groups and self.unit == 0

    @property
    def done(self) -> bool:
        return not self.in_groups and self.extended == len(self.rest)

    @property
    def progress(self) -> float:
        """The share of its units that is done."""
        return (self.group * len(self.units) + self.unit) / (self.num_groups * len(self.units))

    def reuse(self, tokens: int) -> None:
        """Leaves out the first tokens, whose KV is loaded instead; a multiple of the smallest size. Before any unit."""
        assert tokens % self.sizes[0] == 0, f"{tokens} tokens are not a multiple of {self.sizes[0]}"
        self.reused = tokens
        self.__dict__.pop("units", None)


def schedule(start: int, end: int, sizes: Sequence[int], bucket: int) -> tuple[tuple[int, int], ...]:
    """Cuts tokens `start` to `end` into units of `sizes`, which increase; none leaves the `bucket` of the workspace.

    Large ones where they fit, for they are the fastest. At the end a larger one than is needed where more than half of
    it is used.
    """
    units = []
    while start < end:
        fitting = [size for size in sizes if start + size <= bucket]
        size = next((size for size in fitting if end - start <= size < 2 * (end - start)), None)
        if size is None:
            size = max((size for size in fitting if size <= end - start), default=fitting[0])
        units.append((start, size))
        start += size
    return tuple(units)
