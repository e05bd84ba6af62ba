"""What a search has found: a scheme, how it does on samples it has never seen, and everything it was compared with."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.search.config import SearchConfig, from_fields
from kvjax.search.generation import Generation
from kvjax.search.space import Scheme
from kvjax.search.stages import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = "full cache"


@dataclasses.dataclass(frozen=True)
class SetScore:
    """A mean over a set of samples, the 95% interval of it, and the mean log-probability of the answers."""

    mean: float
    low: float
    high: float
    log_probability: float
    samples: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One scheme on the three sets.

    Attributes:
        name: of what found it.
        scheme: None for the full cache.
        gain: test score less that of uniform budgets on the same samples, with the 95% interval of the difference.
        evaluations, seconds: spent to find it.
    """

    name: str
    scheme: Scheme | None
    search: SetScore
    selection: SetScore
    test: SetScore
    gain: tuple[float, float, float]
    evaluations: int
    seconds: float

    @property
    def calibration_gap(self) -> float:
        """By how much the search set flatters it."""
        return self.search.mean - self.test.mean


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of `search`; in a notebook it shows itself.

    Attributes:
        windows: the sliding window of each layer of the model, None where a layer has a budget.
        longest: tokens of the longest prompt, which no layer's number exceeds.
        context: tokens of the model's context, for which the profile is made.
        chosen: what was best on the selection set, never worse there than uniform.
        outcomes: the full cache, the anchors, what was compared, and the allocator that the config names.
        expanded: the chosen proportions at other token budgets.
        history: of the config's allocator.
        versions: of the packages that decide the numbers.
    """

    config: SearchConfig
    model: ModelFingerprint
    windows: tuple[int | None, ...]
    longest: int
    context: int
    chosen: Outcome
    outcomes: tuple[Outcome, ...]
    expanded: dict[int, Scheme]
    history: tuple[Generation, ...]
    versions: dict[str, str]

    @property
    def uniform(self) -> Scheme:
        """What even budgets of the same cost are."""
        return next(outcome.scheme for outcome in self.outcomes if outcome.name == "uniform" and outcome.scheme)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each layer keeps of a prompt: the chosen scheme, of several heads their mean."""
        return self.tokens_of(self.chosen.scheme or self.uniform)

    def tokens_of(self, scheme: Scheme) -> tuple[int, ...]:
        """Tokens that each layer keeps by a scheme of this search."""
        layers = sum(window is None for window in self.windows)
        rows = np.array(scheme).reshape(layers, -1)
        kept = rows[:, 0] if self.config.search == "rocketkv" else np.rint(rows.mean(axis=1))
        return tuple(int(each) for each in kept)

    def cost_of(self, scheme: Scheme) -> float:
        """Tokens a layer on average: kept of a prompt or, where RocketKV's numbers are searched, what a step reads."""
        return float(self.config.token_budget if self.config.search == "rocketkv" else np.mean(scheme))

    def affordable(self, schemes: Int[np.ndarray, "P N"]) -> Bool[np.ndarray, "P"]:
        """Which schemes cost no more than the budget; the numbers of RocketKV always do."""
        if self.config.search == "rocketkv":
            return np.ones(len(schemes), bool)
        return schemes.sum(axis=1) <= self.config.token_budget * schemes.shape[1]

    @property
    def profile(self) -> BudgetProfile:
        """What `serve --budgets` takes."""
        return self.profile_of(self.chosen.scheme or self.uniform)

    def profile_of(self, scheme: Scheme) -> BudgetProfile:
        """A scheme as budgets: what is kept of a prompt, and room for what is generated."""
        config, layers = self.config, sum(window is None for window in self.windows)
        budgets = []
        for row in np.array(scheme).reshape(layers, -1).tolist():
            kernel, stage2 = config.kernel, {}
            if config.search == "rocketkv":
                stages = Stages(config.window, config.sinks, room=config.room)
                kernel, stage2 = stages.kernels[row[2]], {"stage2_tokens": row[1], "page_size": stages.page_size}
                row = row[:1]
            budget = LayerBudget.selecting(
                max(row) + config.room,
                observation_window=config.window,
                pooling_kernel=kernel,
                sinks=config.sinks,
                head_tokens=tuple(row) if len(row) > 1 else None,
                **stage2,
            )
            budgets.append(budget.within(self.context))
        its, full = iter(budgets), BudgetProfile.full(self.windows, self.context).layers
        profile = BudgetProfile(
            tuple(kept if window else next(its) for kept, window in zip(full, self.windows, strict=True))
        )
        profile.check(self.windows, self.context)
        return profile

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the profile comes from, as it is written into its file."""
        return {
            "made_by": "python -m kvjax.search",
            "config": plain(self.config),
            "tokens_kept_of_a_prompt": list(self.tokens),
            "mean": float(np.mean(self.tokens)),
            "chosen": self.chosen.name,
            "outcomes": [plain(outcome) for outcome in self.outcomes],
            "versions": self.versions,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile, and beside it everything else, as NAME.search.json.

        Raises:
            FileNotFoundError: the folder is not there.
        """
        self.profile.save(path, self.model, self.provenance)
        Path(path).with_suffix(".search.json").write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Everything, to draw and compare later; `from_json` reads it."""
        fields = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SearchResult":
        """What `to_json` wrote."""
        fields = json.loads(text)
        fields["config"] = from_fields(fields["config"])
        fields["model"] = ModelFingerprint(**fields["model"])
        fields["windows"] = tuple(fields["windows"])
        fields["chosen"] = _outcome(fields["chosen"])
        fields["outcomes"] = tuple(_outcome(each) for each in fields["outcomes"])
        fields["expanded"] = {int(mean): tuple(scheme) for mean, scheme in fields["expanded"].items()}
        fields["history"] = tuple(_generation(each) for each in fields["history"])
        return cls(**fields)

    def plot_budgets(self) -> "Figure":
        """A bar a layer: searched against uniform and pyramid."""
        from kvjax.search import plots

        return plots.budgets(self)

    def plot_convergence(self) -> "Figure":
        """Every evaluation a dot, the best so far, anchors as lines."""
        from kvjax.search import plots

        return plots.convergence(self)

    def plot_generations(self) -> "Figure":
        """The mean scheme of each generation as a heat map over layers."""
        from kvjax.search import plots

        return plots.generations(self)

    def _repr_html_(self) -> str:
        from kvjax.search.show import html

        return html(self)


def _outcome(fields: dict[str, Any]) -> Outcome:
    sets = {name: SetScore(**fields[name]) for name in ("search", "selection", "test")}
    scheme = None if fields["scheme"] is None else tuple(fields["scheme"])
    return Outcome(**{**fields, **sets, "scheme": scheme, "gain": tuple(fields["gain"])})


def _generation(fields: dict[str, Any]) -> Generation:
    arrays = {name: np.array(fields[name]) for name in ("schemes", "score", "log_probability", "fitness")}
    spread = float("nan") if fields["spread"] is None else fields["spread"]
    return Generation(**arrays, spread=spread, seconds=fields["seconds"])


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
