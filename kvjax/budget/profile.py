"""How many tokens of KV each layer keeps on the device: frozen, hashable, and therefore static to jit.

A profile names one budget a layer; consecutive layers of equal budget and kind form a layer group, the unit of
compilation, of transfer and of prefill memory.
"""

import dataclasses
from collections.abc import Sequence

MAX_GROUP_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """What one layer keeps. `capacity` is the number of KV entries a view holds for each kv head of a slot."""

    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: a view holds at least one entry")


@dataclasses.dataclass(frozen=True)
class BudgetProfile:
    """One `LayerBudget` a layer. Equal profiles are equal keys of the compilation cache."""

    layers: tuple[LayerBudget, ...]

    @classmethod
    def full(cls, windows: Sequence[int | None], context: int) -> "BudgetProfile":
        """Keeps everything: `context` entries, or the window of a sliding layer where that is smaller.

        Args:
            windows: the sliding window of each layer in tokens, None where a layer sees its whole context.
            context: most tokens a sequence may have.
        """
        return cls(tuple(LayerBudget(min(context, window or context)) for window in windows))

    def groups(self, kinds: Sequence[object]) -> tuple[range, ...]:
        """Splits the layers into runs of equal budget and equal kind, at most `MAX_GROUP_LAYERS` long.

        Args:
            kinds: for each layer whatever else its compiled body depends on, compared by equality.
        """
        if len(kinds) != len(self.layers):
            raise ValueError(f"the profile has {len(self.layers)} layers, the model {len(kinds)}")
        keys = list(zip(self.layers, kinds, strict=True))
        starts = [0]
        for layer in range(1, len(keys)):
            if keys[layer] != keys[layer - 1] or layer - starts[-1] == MAX_GROUP_LAYERS:
                starts.append(layer)
        return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True))
