"""A prompt that is being read: how far it is, and what the store holds for it meanwhile."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from kvjax.attention.methods import LayerCacheConfig
from kvjax.engine.generation_writer import GenerationWriter
from kvjax.engine.prefix import PromptWriter
from kvjax.store.prefix_load import PrefixLoad


@dataclasses.dataclass(eq=False)
class Prefill:
    """A prompt on its way through the layers: group after group, and chunk after chunk inside a group.

    Attributes:
        tokens: the prompt up to where the views are selected, padded to its bucket; `length` is without padding.
        rest: what comes after, and is read through the views; usually nothing.
        hidden: hidden states of all positions [T, E] before layer group `group`.
        size: tokens of a chunk; `chunk` is the next one of that group.
        groups: layer groups in all.
        plans: what each layer keeps of this prompt, and reads of it a step: the runner's, or what smaller numbers make
            of them.
        begin: position at which the last turn begins; 0 where the views are to be chosen by whatever comes last.
        reused: how many of the first chunks are not computed: their KV is among what `fetch` has brought.
        saver: takes the KV of the others to the store; `answer` that of what follows.
        extended: tokens of the rest that are read; `last` is the hidden state [1, E] of the last of them.
        restored: by layer, what is there once its last reused chunk is.
    """

    tokens: np.ndarray
    rest: np.ndarray
    length: int
    slot: int
    hidden: jax.Array
    size: int
    groups: int
    plans: Sequence[LayerCacheConfig]
    begin: int = 0
    reused: int = 0
    fetch: PrefixLoad | None = None
    saver: PromptWriter | None = None
    answer: GenerationWriter | None = None
    group: int = 0
    chunk: int = 0
    extended: int = 0
    restored: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    last: jax.Array | None = None

    @property
    def prompt(self) -> np.ndarray:
        return np.concatenate([self.tokens[: self.length], self.rest])

    @property
    def chunks(self) -> int:
        return -(-self.length // self.size)

    @property
    def done(self) -> bool:
        return self.group == self.groups and self.extended == len(self.rest)

    @property
    def progress(self) -> float:
        """The share of its units that is done."""
        units = self.chunks - self.reused
        return (self.group * units + max(self.chunk - self.reused, 0)) / (self.groups * units)

    def close(self) -> None:
        """Lets go of everything that the store holds for it. May be called twice, and before it is done.

        Waits until the device has read what it was given of the store's memory.
        """
        if self.saver is not None:
            self.saver.give_up()
        if self.fetch is not None:
            jax.block_until_ready(self.restored)
            self.fetch.close()
