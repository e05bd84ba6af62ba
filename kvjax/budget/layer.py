"""One layer's budget: what its view keeps of a sequence, and what a decode step reads of the view."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of the types that it lacks: bfloat16, float8
import numpy as np

OptionValue = bool | int | float | str
Options = tuple[tuple[str, OptionValue], ...]  # hyper-parameters of a method by name, in the order of the names


def sorted_options(values: Mapping[str, OptionValue]) -> Options:
    """Options in the one order that a budget has them in."""
    return tuple(sorted(values.items()))


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """What one layer keeps (eviction), and what a decode step reads of that (selection).

    A budget of nothing but a capacity evicts nothing: the view holds the last `capacity` entries, which are all of
    them in a full layer and the window in a sliding one. What methods have beyond these numbers are options, which a
    budget carries and the method declares, checks and completes (`Method.resolve`). One behaviour has one spelling: a
    field that would have no effect must have its default, so that budgets that act alike are equal keys.

    Attributes:
        capacity: KV entries that a view holds for each kv head of a slot.
        selected_tokens: tokens of the view that a decode step attends to exactly; None reads the whole view.
        page_size: consecutive entries of the view that share one summary, by which a step selects.
        head_tokens: tokens of a prompt that each kv head keeps, where they are not the same; the capacity is room for
            the most, and generated tokens.
        eviction_options: options of the method's eviction, in the order of their names; None where nothing is evicted.
        selection_options: options of the method's selection.

    Raises:
        TypeError: a value that is not a whole number, or options that are not pairs of a name and a value.
        ValueError: a value out of bounds, or one that would have no effect; the message says what to change.
    """

    capacity: int
    _: dataclasses.KW_ONLY
    selected_tokens: int | None = None
    page_size: int = 1
    head_tokens: tuple[int, ...] | None = None
    eviction_options: Options | None = None
    selection_options: Options = ()

    @classmethod
    def selecting(
        cls,
        capacity: int,
        *,
        selected_tokens: int | None = None,
        page_size: int = 1,
        head_tokens: tuple[int, ...] | None = None,
        selection_options: Mapping[str, OptionValue] | None = None,
        **eviction_options: OptionValue,
    ) -> "LayerBudget":
        """A layer that evicts; what is not among the options has the method's default."""
        return cls(
            capacity,
            selected_tokens=selected_tokens,
            page_size=page_size,
            head_tokens=head_tokens,
            eviction_options=sorted_options(eviction_options),
            selection_options=sorted_options(selection_options or {}),
        )

    def __post_init__(self) -> None:
        for name, optional in (("capacity", False), ("selected_tokens", True), ("page_size", False)):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and optional):  # True is no number here
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}: give an int")
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity}: a view holds at least one entry")
        _check_options("eviction_options", self.eviction_options or ())
        _check_options("selection_options", self.selection_options)
        self._check_head_tokens()
        self._check_selection()

    def _check_head_tokens(self) -> None:
        if self.head_tokens is None:
            return
        if type(self.head_tokens) is not tuple:
            raise TypeError(f"head_tokens={self.head_tokens!r} is a {type(self.head_tokens).__name__}: give a tuple")
        if self.eviction_options is None:
            raise ValueError(
                f"head_tokens={self.head_tokens} has no effect while eviction_options is None: give options, () for "
                "the method's defaults, or leave head_tokens at None"
            )
        for retained in self.head_tokens or (0,):
            if type(retained) is not int or not 1 <= retained <= self.capacity:
                raise ValueError(
                    f"head_tokens={self.head_tokens}: a kv head keeps from 1 to capacity={self.capacity} tokens"
                )

    def _check_selection(self) -> None:
        if self.selected_tokens is None:
            for name, default in (("page_size", 1), ("selection_options", ())):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect while selected_tokens is None: say how many "
                        f"tokens a step reads, or leave {name} at {default}"
                    )
            return
        if not 1 <= self.selected_tokens < self.capacity:
            raise ValueError(
                f"selected_tokens={self.selected_tokens} must be at least 1 and below capacity={self.capacity}: "
                "None reads the whole view"
            )
        if not 1 <= self.page_size <= self.capacity:
            raise ValueError(f"page_size={self.page_size} must be 1 to capacity={self.capacity}: 4, 8 and 16 are usual")

    def within(self, context: int, capacity: int | None = None) -> "LayerBudget":
        """The same budget cut to a context, if requested at another capacity; what then has no effect is dropped.

        Nothing is evicted where everything fits, and a view no larger than what a step selects is read as a whole.

        Args:
            context: most tokens a sequence may have.
            capacity: entries of the view, before it is cut; None for those it has.
        """
        capacity = min(self.capacity if capacity is None else capacity, context)
        eviction: dict[str, Any] = {}
        selection: dict[str, Any] = {"page_size": min(self.page_size, capacity)}
        if capacity == context:
            eviction = {"eviction_options": None, "head_tokens": None}
        elif self.head_tokens is not None:
            eviction = {"head_tokens": tuple(min(retained, capacity) for retained in self.head_tokens)}
        if self.selected_tokens is None or self.selected_tokens >= capacity:
            selection = {"selected_tokens": None, "page_size": 1, "selection_options": ()}
        return dataclasses.replace(self, capacity=capacity, **eviction, **selection)

    def nbytes(self, kv_heads: int, head_dim: int, dtype: Any) -> int:
        """Bytes that one sequence takes in this layer: K, V, and the two summaries of each page.

        Pages of one entry have no summaries, for the key is its own. Where each entry came from (4 bytes for each
        entry and kv head) is not counted.

        Args:
            kv_heads, head_dim: of the model.
            dtype: of the cache; anything that names one.
        """
        pages = -(-self.capacity // self.page_size) if self.page_size > 1 else 0
        return 2 * (self.capacity + pages) * kv_heads * head_dim * np.dtype(dtype).itemsize


def _check_options(field: str, options: Options) -> None:
    if type(options) is not tuple or not all(type(pair) is tuple and len(pair) == 2 for pair in options):
        raise TypeError(f"{field}={options!r} must be a tuple of pairs of a name and a value: use sorted_options()")
    names = [name for name, _ in options]
    for name, value in options:
        if type(name) is not str or type(value) not in (bool, int, float, str):
            raise TypeError(
                f"{field}: {name!r}={value!r} is a {type(value).__name__}: give a bool, int, float or string by name"
            )
        if type(value) is float and not np.isfinite(value):
            raise ValueError(f"{field}: {name}={value} is not finite, and no profile could be saved: give a number")
    if names != sorted(set(names)):
        raise ValueError(f"{field} are {', '.join(names)}: each name once, in their order: use sorted_options()")
