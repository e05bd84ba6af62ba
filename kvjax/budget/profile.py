"""A budget for every layer of a model, the ways to make one, and the layer groups that follow from it.

Every constructor takes the sliding window of each layer and the context. It leaves sliding layers alone, for these
keep their window whatever happens, and gives no layer more than the context.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvjax.budget import file
from kvjax.budget.fingerprint import ModelFingerprint
from kvjax.budget.layer import LayerBudget
from kvjax.budget.split import adaptive_split, pyramid_capacities

MAX_GROUP_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class BudgetProfile:
    """One `LayerBudget` a layer. Equal profiles are equal keys of the compilation cache.

    Raises:
        ValueError: there is no layer.
    """

    layers: tuple[LayerBudget, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a profile of 0 layers: give one budget for each layer of the model, at least one")

    @classmethod
    def full(cls, windows: Sequence[int | None], context: int) -> "BudgetProfile":
        """Keeps everything: `context` entries, or the window of a sliding layer where that is smaller.

        Args:
            windows: the sliding window of each layer in tokens, None where a layer sees its whole context.
            context: most tokens a sequence may have.
        """
        return cls(tuple(LayerBudget(min(context, window or context)) for window in windows))

    @classmethod
    def uniform(cls, windows: Sequence[int | None], context: int, budget: LayerBudget) -> "BudgetProfile":
        """Every layer gets the same budget, as SnapKV and RocketKV have it.

        Args:
            windows, context: as `full`.
            budget: of each layer that does not slide, cut to the context.

        Raises:
            ValueError: it keeps less than the context but has no window to choose by.
        """
        return cls._around_sliding(windows, context, [budget.within(context)] * _choosing(windows))

    @classmethod
    def pyramid(
        cls, windows: Sequence[int | None], context: int, budget: LayerBudget, beta: int | float = 20, *, least: int = 1
    ) -> "BudgetProfile":
        """PyramidKV: capacities fall from layer to layer in an arithmetic series, with the total of `uniform`.

        Args:
            windows, context: as `full`.
            budget: of each layer that does not slide; its capacity is their mean.
            beta: how steep; the last layer gets the beta-th part of the mean beyond `least`.
            least: entries that every layer has: the observation window.

        Raises:
            ValueError: as `uniform`, or beta is below 1.
        """
        count = _choosing(windows)
        mean = min(budget.capacity, context)
        capacities = pyramid_capacities(count, mean, min(least, mean), context, beta) if count else []
        return cls._around_sliding(windows, context, [budget.within(context, each) for each in capacities])

    @classmethod
    def adaptive(
        cls,
        windows: Sequence[int | None],
        context: int,
        token_budget: int,
        *,
        max_new_tokens: int,
        head_dim: int,
        observation_window: int = 32,
        pooling_kernel: int = 63,
    ) -> "BudgetProfile":
        """RocketKV: one token budget split between the two stages, alike in all layers; see `adaptive_split`.

        Args:
            windows, context: as `full`.
            token_budget: KV pairs' worth of traffic for each kv head, layer and step; a context within it is kept.
            max_new_tokens: how many tokens of the context are generated.
            head_dim: of the model.
            observation_window, pooling_kernel: of stage 1.

        Raises:
            ValueError: as `adaptive_split`.
        """
        budget = adaptive_split(
            context,
            max_new_tokens,
            token_budget,
            head_dim,
            observation_window=observation_window,
            pooling_kernel=pooling_kernel,
        )
        return cls.uniform(windows, context, budget)

    @classmethod
    def from_group_budgets(
        cls,
        windows: Sequence[int | None],
        context: int,
        capacities: Sequence[int],
        like: LayerBudget,
        group_layers: int = MAX_GROUP_LAYERS,
    ) -> "BudgetProfile":
        """EvolKV: one capacity for each group of layers (arXiv 2509.08315).

        Groups are counted over the layers that do not slide, so that every number acts on as many layers.

        Args:
            windows, context: as `full`.
            capacities: one a group, from the first layers to the last; the last group may have fewer layers.
            like: what every layer has besides its capacity.
            group_layers: layers of a group; 1 gives every layer a number of its own.

        Raises:
            ValueError: as `uniform`, another number of groups, or a capacity below 1.
        """
        if group_layers < 1:
            raise ValueError(f"group_layers={group_layers} must be at least 1: EvolKV has 8")
        count = _choosing(windows)
        groups = -(-count // group_layers)
        if len(capacities) != groups:
            raise ValueError(
                f"{len(capacities)} capacities for {count} layers that do not slide, in groups of {group_layers}: "
                f"give {groups}, one a group"
            )
        each = [like.within(context, capacities[layer // group_layers]) for layer in range(count)]
        return cls._around_sliding(windows, context, each)

    @classmethod
    def _around_sliding(
        cls, windows: Sequence[int | None], context: int, budgets: Iterable[LayerBudget]
    ) -> "BudgetProfile":
        """A checked profile; `budgets` are those of the layers that do not slide."""
        remaining = iter(budgets)
        full = cls.full(windows, context).layers
        profile = cls(tuple(kept if window else next(remaining) for kept, window in zip(full, windows, strict=True)))
        profile.check(windows, context)
        return profile

    def within(self, context: int) -> "BudgetProfile":
        """The profile for a shorter context: no layer keeps more than that. A longer one needs a profile of its own."""
        return BudgetProfile(tuple(budget.within(context) for budget in self.layers))

    def check(self, windows: Sequence[int | None], context: int) -> None:
        """Raises where a model of these windows would lose what it needs, or keep what can never be.

        Args:
            windows, context: as `full`.

        Raises:
            ValueError: another number of layers; a sliding layer that keeps anything but its window; a layer that
                keeps more than the context, or less without a window to choose by.
        """
        if len(windows) != len(self.layers):
            raise ValueError(f"the profile has {len(self.layers)} layers, the model {len(windows)}")
        kept = self.full(windows, context).layers
        for layer, (budget, window, whole) in enumerate(zip(self.layers, windows, kept, strict=True)):
            if window and budget != whole:
                raise ValueError(
                    f"layer {layer} slides over {window} tokens and keeps exactly {whole.capacity} of {context}, "
                    f"but its budget is {budget}: use {whole}"
                )
            if budget.capacity > context:
                raise ValueError(
                    f"layer {layer} has capacity={budget.capacity}, more than the context of {context} tokens: "
                    f"cut the profile with within({context})"
                )
            if not window and budget.capacity < context and budget.eviction_options is None:
                raise ValueError(
                    f"layer {layer} has capacity={budget.capacity} for a context of {context} tokens, and "
                    "eviction_options is None, so nothing would choose what stays: give it some (() are the method's "
                    f"defaults), raise the capacity to {context}, or shorten the context to {budget.capacity}"
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: ModelFingerprint) -> "BudgetProfile":
        """Reads the profile of a model; `check` tells whether it fits a context.

        Args:
            path: a file that `save` wrote, or one that follows `kvjax/budget/schema.json`.
            model: the model it shall serve.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no profile, or one for another model; names the fields at fault.
        """
        return cls(file.read(path, model))

    @staticmethod
    def made_for(path: str | os.PathLike[str]) -> ModelFingerprint:
        """The model that the profile in a file names.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no profile.
        """
        return file.made_for(path)

    def save(
        self, path: str | os.PathLike[str], model: ModelFingerprint, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the profile as JSON, in one canonical form: equal profiles are equal bytes.

        Args:
            path: the file, replaced if it exists; its folder must exist.
            model: the model it is for.
            provenance: where it comes from (seed, scores, versions ...): JSON values, kept beside it, never read.

        Raises:
            ValueError: it does not fit that model, or `provenance` holds a number that JSON does not have.
        """
        file.write(path, self.layers, model, provenance)

    @property
    def digest(self) -> str:
        """SHA-256 of the budgets, as hexadecimal digits; the same in every process."""
        return file.digest(self.layers)

    @property
    def tokens(self) -> int:
        """KV entries kept for each kv head of a sequence, over all layers."""
        return sum(budget.capacity for budget in self.layers)

    def nbytes(self, kv_heads: int, head_dim: int, dtype: Any) -> int:
        """Bytes kept for one sequence over all layers; what counts, and the arguments, as `LayerBudget.nbytes`."""
        return sum(budget.nbytes(kv_heads, head_dim, dtype) for budget in self.layers)

    def groups(self, kinds: Sequence[object], most: int = MAX_GROUP_LAYERS) -> tuple[range, ...]:
        """Splits the layers into runs of equal budget and equal kind, at most `most` long.

        Args:
            kinds: for each layer whatever else its compiled body depends on, compared by equality.
            most: 1 to `MAX_GROUP_LAYERS`; the fewer, the less memory the workspaces of a prefill take.

        Raises:
            ValueError: `most` is out of bounds, or `kinds` are those of another number of layers.
        """
        if not 1 <= most <= MAX_GROUP_LAYERS:
            raise ValueError(f"groups of {most} layers: must be 1 to {MAX_GROUP_LAYERS}")
        if len(kinds) != len(self.layers):
            raise ValueError(f"the profile has {len(self.layers)} layers, the model {len(kinds)}")
        keys = list(zip(self.layers, kinds, strict=True))
        starts = [0]
        for layer in range(1, len(keys)):
            if keys[layer] != keys[layer - 1] or layer - starts[-1] == most:
                starts.append(layer)
        return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True))


def _choosing(windows: Sequence[int | None]) -> int:
    """How many layers do not slide, and so have a budget to choose."""
    return sum(not window for window in windows)
