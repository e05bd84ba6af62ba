"""Occupancy of the slots' views, known on the host by counting: nothing is read back from the device."""

from collections.abc import Iterator, Sequence

import numpy as np

from kvjax.attention.methods import LayerCacheConfig


class Occupancy:
    """Entries in the views of layers that choose tokens; the others never fill up before the context ends.

    A slot's view is full when the plans of its request say so, which may be before the array is.
    A slot that decodes gains one entry a step, and one that has ended on the device is counted on until it is freed.

    Attributes:
        length: tokens of each slot's sequence whose KV has been computed [B].
    """

    def __init__(self, plans: Sequence[LayerCacheConfig], slots: int) -> None:
        self._layers = [layer for layer, plan in enumerate(plans) if plan.eviction is not None]
        self._max_retained, self._capacity, self._used = np.zeros((3, len(self._layers), slots), np.int64)
        self.length = np.zeros(slots, np.int64)
        for slot in range(slots):
            self.written(slot, 0, plans)

    def written(self, slot: int, length: int, plans: Sequence[LayerCacheConfig]) -> None:
        """A prompt has entered the slot's views, by the plans of its request."""
        self.length[slot] = length
        self._max_retained[:, slot] = [plans[layer].max_retained for layer in self._layers]
        self._capacity[:, slot] = [plans[layer].capacity for layer in self._layers]
        self._used[:, slot] = np.minimum(self._max_retained[:, slot], length)

    def resumed(self, slot: int, length: int, used: Sequence[int], plans: Sequence[LayerCacheConfig]) -> None:
        """A conversation that has stood still goes on here, after `length` tokens, with `used` entries in each view."""
        self.written(slot, length, plans)
        self._used[:, slot] = [used[layer] for layer in self._layers]

    def check_slot(self, slot: int, length: int, used: Sequence[int]) -> None:
        """Raises AssertionError unless a slot stands where its arrays say."""
        assert self.length[slot] == length, (slot, self.length[slot], length)
        counted = self._used[:, slot].tolist()
        assert counted == [used[layer] for layer in self._layers], (slot, counted, used)

    def full(self, alive: np.ndarray) -> Iterator[tuple[int, int]]:
        """Layer and slot of every full view, of the slots that are `alive` [B]."""
        for row, slot in np.argwhere((self._used >= self._capacity) & alive):
            yield self._layers[row], int(slot)

    def reselected(self, layer: int, slot: int) -> None:
        """The view has been cut back to what it keeps."""
        row = self._layers.index(layer)
        self._used[row, slot] = self._max_retained[row, slot]

    def advance(self, alive: np.ndarray, count: int) -> int:
        """Counts up to `count` steps, no more than the fullest view has room for (but one); returns how many."""
        room = (self._capacity - self._used)[:, alive]
        count = max(min(count, int(room.min(initial=count))), 1)
        self._used[:, alive] += count
        self.length[alive] += count
        return count

    def check_integrity(self) -> None:
        """Raises AssertionError if a view holds more than its request may have. Not for views that are never cut."""
        assert (self._used <= self._capacity).all(), (self._used, self._capacity)
        assert (self._max_retained < self._capacity).all(), (self._max_retained, self._capacity)
