"""Search result: data only. The chosen candidate, its scores on unseen samples, and all that it was compared with."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.search.config import SearchConfig, from_fields
from kvjax.search.generation import SearchGeneration
from kvjax.search.outcome import SETS, Outcome, SetScore
from kvjax.search.spaces import Candidate, SearchSpace


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of `search`. A notebook shows it as `kvjax.search.report.render.html`.

    Attributes:
        windows: the sliding window of each layer of the model, None where a layer has a budget.
        longest: tokens of the longest prompt, which no layer's number exceeds.
        context: tokens of the model's context, for which the profile is made.
        chosen: the best of `outcomes` on the selection set, of equals the one that took the fewest evaluations; so
            never worse there than uniform.
        outcomes: the full cache, the anchors, what was compared, and the allocator that the config names.
        expanded: for other token budgets, uniform ones and the chosen proportions scaled to them.
        history: of the config's allocator.
        versions: of the packages that decide the numbers.
        made_by: the command that searched.
    """

    config: SearchConfig
    model: ModelFingerprint
    windows: tuple[int | None, ...]
    longest: int
    context: int
    chosen: Outcome
    outcomes: tuple[Outcome, ...]
    expanded: dict[int, tuple[Outcome, ...]]
    history: tuple[SearchGeneration, ...]
    versions: dict[str, str]
    made_by: str = "kvjax.search.run.search"
    _repr_html_: ClassVar[Callable[["SearchResult"], str]]  # set by the package, for this file knows no report

    @functools.cached_property
    def space(self) -> SearchSpace:
        """The space that was searched."""
        layers = sum(window is None for window in self.windows)
        return self.config.space(layers=layers, kv_heads=self.model.kv_heads, longest=self.longest)

    @property
    def uniform(self) -> Candidate:
        """Even budgets of the same cost."""
        return self.outcome("uniform").candidate or ()

    def outcome(self, name: str) -> Outcome:
        """The outcome of the allocator of that name.

        Raises:
            KeyError: nothing of that name was compared.
        """
        outcomes = {outcome.name: outcome for outcome in self.outcomes}
        if name not in outcomes:
            raise KeyError(f"{name} was not compared, there are {', '.join(outcomes)}: name it in `compare`")
        return outcomes[name]

    @property
    def sweep(self) -> tuple["SearchResult", ...]:
        """This search and what it expands to, as a result for each token budget, the smallest first."""
        full = tuple(outcome for outcome in self.outcomes if outcome.candidate is None)
        others = [
            dataclasses.replace(
                self,
                config=dataclasses.replace(self.config, token_budget=mean, expand=()),
                chosen=outcomes[-1],
                outcomes=full + outcomes,
                expanded={},
                history=(),
            )
            for mean, outcomes in self.expanded.items()
        ]
        return tuple(sorted((self, *others), key=lambda result: result.config.token_budget))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each layer keeps of a prompt by the chosen candidate; where its heads differ, their mean."""
        return self.space.tokens(self.chosen.candidate or self.uniform)

    @property
    def profile(self) -> BudgetProfile:
        """The chosen candidate as `serve --budgets` takes it."""
        return self.profile_of(self.chosen.candidate or self.uniform)

    def profile_of(self, candidate: Candidate) -> BudgetProfile:
        """A candidate as a profile of the model; layers that slide keep their window."""
        full = BudgetProfile.full(self.windows, self.context).layers
        budgets = iter(self.space.budgets(candidate, self.config.eviction))
        profile = BudgetProfile(
            tuple(
                layer if window else next(budgets).within(self.context)
                for layer, window in zip(full, self.windows, strict=True)
            )
        )
        profile.check(self.windows, self.context)
        return profile

    @property
    def provenance(self) -> dict[str, Any]:
        """The origin of the profile, as it is written into its file."""
        return {
            "made_by": self.made_by,
            "config": plain(self.config),
            "tokens_retained_of_a_prompt": list(self.tokens),
            "mean": float(np.mean(self.tokens)),
            "chosen": self.chosen.name,
            "outcomes": [plain(dataclasses.replace(outcome, each=())) for outcome in self.outcomes],
            "versions": self.versions,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile, beside it those of other token budgets as NAME-64.json, and all else as NAME.search.json.

        Raises:
            FileNotFoundError: the folder is not there.
        """
        path = Path(path)
        for result in self.sweep:
            mean = result.config.token_budget
            file = path if mean == self.config.token_budget else path.with_stem(f"{path.stem}-{mean}")
            result.profile.save(file, result.model, result.provenance)
        path.with_suffix(".search.json").write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Everything, to draw and compare later; `from_json` reads it."""
        fields = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SearchResult":
        """A result that `to_json` wrote, of this version or an earlier one."""
        fields = json.loads(text)
        fields["config"] = from_fields(fields["config"])
        fields["model"] = ModelFingerprint(**fields["model"])
        fields["windows"] = tuple(fields["windows"])
        fields["chosen"] = _outcome(fields["chosen"])
        fields["outcomes"] = tuple(_outcome(each) for each in fields["outcomes"])
        fields["expanded"] = {int(mean): tuple(map(_outcome, each)) for mean, each in fields["expanded"].items()}
        fields["history"] = tuple(_generation(each) for each in fields["history"])
        return cls(**fields)


def _outcome(fields: dict[str, Any]) -> Outcome:
    fields = _renamed(fields, "scheme", "candidate")
    sets = {name: SetScore(**fields[name]) for name in SETS}
    tuples = {name: tuple(fields[name]) for name in ("gain", "each")}
    candidate = None if fields["candidate"] is None else tuple(fields["candidate"])
    return Outcome(**{**fields, **sets, **tuples, "candidate": candidate})


def _generation(fields: dict[str, Any]) -> SearchGeneration:
    fields = _renamed(fields, "schemes", "candidates")
    arrays = {name: np.array(fields[name]) for name in ("candidates", "score", "log_probability", "fitness")}
    spread = float("nan") if fields["spread"] is None else fields["spread"]
    return SearchGeneration(**arrays, spread=spread, seconds=fields["seconds"])


def _renamed(fields: dict[str, Any], before: str, now: str) -> dict[str, Any]:
    """Fields of a file in which an earlier version may have written one under another name."""
    return {now if name == before else name: value for name, value in fields.items()}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value
