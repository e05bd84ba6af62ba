"""Method options: the hyper-parameters that a method declares, and that the budget of a layer may set."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal

from kvjax.budget.layer import Options, OptionValue, sorted_options


@dataclasses.dataclass(frozen=True)
class MethodOption:
    """A hyper-parameter of a method: its name in budgets, its type, default and bounds.

    Attributes:
        name: as budgets and their files spell it.
        kind: int, float, bool or str; a whole number counts as a float, and True as neither.
        default: where a budget does not set it; None where every budget must.
        minimum, maximum: bounds of a number, both allowed; "head_dim" is that of the model.
        odd: only odd numbers.
    """

    name: str
    kind: type[OptionValue]
    default: OptionValue | None = None
    _: dataclasses.KW_ONLY
    minimum: int | float | None = None
    maximum: int | float | Literal["head_dim"] | None = None
    odd: bool = False

    def check(self, value: OptionValue, head_dim: int | None = None) -> OptionValue:
        """The value, in the option's type.

        Raises:
            TypeError: of another type.
            ValueError: out of bounds.
        """
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise TypeError(f"{self.name}={value!r} is a {type(value).__name__}: give {self._article} {self._kind}")
        if isinstance(value, str):
            return value
        if self.odd and (value % 2 == 0 or (self.minimum is not None and value < self.minimum)):
            least = "" if self.minimum is None else f" and at least {self.minimum:g}"
            nearest = value + 1 if self.minimum is None else max(value + 1, int(self.minimum))
            raise ValueError(f"{self.name}={value} must be odd{least}: use {nearest}")
        if self.minimum is not None and value < self.minimum:
            raise ValueError(f"{self.name}={value} must be at least {self.minimum:g}{self._otherwise}")
        maximum = head_dim if self.maximum == "head_dim" else self.maximum
        if maximum is not None and value > maximum:
            bound = ", which a head of the model has" if self.maximum == "head_dim" else ""
            raise ValueError(f"{self.name}={value} must be at most {maximum:g}{bound}{self._otherwise}")
        return value

    @property
    def _otherwise(self) -> str:
        return "" if self.default is None else f": {self.default} unless it is set"

    @property
    def _kind(self) -> str:
        return "string" if self.kind is str else self.kind.__name__

    @property
    def _article(self) -> str:
        return "an" if self.kind is int else "a"


def resolve_options(
    owner: str, stage: str, declared: Sequence[MethodOption], given: Options, head_dim: int | None = None
) -> Options:
    """Every declared option with the value given, or its default.

    Args:
        owner, stage: the method's name and "eviction" or "selection", for errors.
        head_dim: of the model; None leaves bounds by it unchecked.

    Raises:
        TypeError: a value of another type.
        ValueError: a name that is not declared, a value out of bounds, or none where there is no default.
    """
    values, known = dict(given), [option.name for option in declared]
    for name, value in given:
        if name in known:
            continue
        if not known:
            raise ValueError(f"{name}={value} has no effect: {owner} has no {stage} options; use another method")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{owner} has no {stage} option {name!r} ({name}={value}): {hint}it knows {', '.join(sorted(known))}"
        )
    resolved: dict[str, OptionValue] = {}
    for option in declared:
        value = values.get(option.name, option.default)
        if value is None:
            raise ValueError(f"{owner} needs the {stage} option {option.name}: give it in the budget")
        resolved[option.name] = option.check(value, head_dim)
    return sorted_options(resolved)
