"""What a search has found: a candidate, how it does on samples it has never seen, and everything it was compared with."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.search.config import SearchConfig, from_fields
from kvjax.search.generation import SearchGeneration
from kvjax.search.outcome import SETS, Outcome, SetScore
from kvjax.search.space import Candidate
from kvjax.search.stages import Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of `search`; in a notebook it shows itself.

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

    @property
    def uniform(self) -> Candidate:
        """What even budgets of the same cost are."""
        return self.outcome("uniform").candidate or ()

    def outcome(self, name: str) -> Outcome:
        """What the allocator of that name has found.

        Raises:
            KeyError: nothing of that name was compared.
        """
        found = {outcome.name: outcome for outcome in self.outcomes}
        if name not in found:
            raise KeyError(f"{name} was not compared, there are {', '.join(found)}: name it in `compare`")
        return found[name]

    @property
    def sweep(self) -> tuple["SearchResult", ...]:
        """This search and what it expands to, as a result for each token budget, the smallest first."""
        full = tuple(outcome for outcome in self.outcomes if outcome.candidate is None)
        others = [
            dataclasses.replace(
                self,
                config=dataclasses.replace(self.config, token_budget=mean, expand=()),
                chosen=found[-1],
                outcomes=full + found,
                expanded={},
                history=(),
            )
            for mean, found in self.expanded.items()
        ]
        return tuple(sorted((self, *others), key=lambda result: result.config.token_budget))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that each layer keeps of a prompt: the chosen candidate, of several heads their mean."""
        return self.tokens_of(self.chosen.candidate or self.uniform)

    def tokens_of(self, candidate: Candidate) -> tuple[int, ...]:
        """Tokens that each layer keeps by a candidate of this search."""
        layers = sum(window is None for window in self.windows)
        rows = np.array(candidate).reshape(layers, -1)
        retained = rows[:, 0] if self.config.search == "rocketkv" else np.rint(rows.mean(axis=1))
        return tuple(int(each) for each in retained)

    def cost_of(self, candidate: Candidate) -> float:
        """Tokens a layer on average: kept of a prompt or, where RocketKV's numbers are searched, what a step reads."""
        return float(self.config.token_budget if self.config.search == "rocketkv" else np.mean(candidate))

    def affordable(self, candidates: Int[np.ndarray, "P N"]) -> Bool[np.ndarray, "P"]:
        """Which candidates cost no more than the budget; the numbers of RocketKV always do."""
        if self.config.search == "rocketkv":
            return np.ones(len(candidates), bool)
        return candidates.sum(axis=1) <= self.config.token_budget * candidates.shape[1]

    @property
    def profile(self) -> BudgetProfile:
        """What `serve --budgets` takes."""
        return self.profile_of(self.chosen.candidate or self.uniform)

    def profile_of(self, candidate: Candidate) -> BudgetProfile:
        """A candidate as budgets: what is kept of a prompt, and room for what is generated."""
        config, layers = self.config, sum(window is None for window in self.windows)
        budgets = []
        for row in np.array(candidate).reshape(layers, -1).tolist():
            kernel, selection = config.kernel, {}
            if config.search == "rocketkv":
                stages = Stages(config.window, config.sinks, headroom=config.headroom)
                kernel, selection = stages.kernels[row[2]], {"stage2_tokens": row[1], "page_size": stages.page_size}
                row = row[:1]
            budget = LayerBudget.selecting(
                max(row) + config.headroom,
                observation_window=config.window,
                pooling_kernel=kernel,
                sinks=config.sinks,
                head_tokens=tuple(row) if len(row) > 1 else None,
                **selection,
            )
            budgets.append(budget.within(self.context))
        its, full = iter(budgets), BudgetProfile.full(self.windows, self.context).layers
        profile = BudgetProfile(
            tuple(retained if window else next(its) for retained, window in zip(full, self.windows, strict=True))
        )
        profile.check(self.windows, self.context)
        return profile

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the profile comes from, as it is written into its file."""
        return {
            "made_by": self.made_by,
            "config": plain(self.config),
            "tokens_retained_of_a_prompt": list(self.tokens),
            "mean": float(np.mean(self.tokens)),
            "chosen": self.chosen.name,
            "outcomes": [plain(dataclasses.replace(outcome, each=())) for outcome in self.outcomes],
            "versions": self.versions,
        }

    def resume(self, evaluations: int, **given: Any) -> "SearchResult":
        """The search goes on to so many `evaluations`, and ends as one that had been given as many at once.

        What was evaluated is not evaluated again, prompts are read anew; a result read from JSON will do.

        Args:
            given: model, encode, sets, bench and progress, as `kvjax.search.search` takes them.

        Raises:
            ValueError: it has evaluated more than that, or `given` is not what it was made with.
        """
        from kvjax.search.run import search

        # what is saved there ends at the former number
        config = dataclasses.replace(self.config, evaluations=evaluations, runs=None)
        return search(config, history=self.history, **given)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile, beside it those of other token budgets as NAME-64.json, and all else as NAME.search.json.

        Raises:
            FileNotFoundError: the folder is not there.
        """
        path = Path(path)
        for its in self.sweep:
            mean = its.config.token_budget
            file = path if mean == self.config.token_budget else path.with_stem(f"{path.stem}-{mean}")
            its.profile.save(file, its.model, its.provenance)
        path.with_suffix(".search.json").write_text(self.to_json() + "\n")

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
        fields["expanded"] = {int(mean): tuple(map(_outcome, found)) for mean, found in fields["expanded"].items()}
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
        """The mean candidate of each generation as a heat map over layers."""
        from kvjax.search import plots

        return plots.generations(self)

    def plot_pareto(self) -> "Figure":
        """Accuracy against bytes at the token budget and at all that it expands to."""
        from kvjax.search import plots

        return plots.pareto(self.sweep)

    def _repr_html_(self) -> str:
        from kvjax.search.render import html

        return html(self)


def _outcome(fields: dict[str, Any]) -> Outcome:
    sets = {name: SetScore(**fields[name]) for name in SETS}
    tuples = {name: tuple(fields[name]) for name in ("gain", "each")}
    candidate = None if fields["candidate"] is None else tuple(fields["candidate"])
    return Outcome(**{**fields, **sets, **tuples, "candidate": candidate})


def _generation(fields: dict[str, Any]) -> SearchGeneration:
    arrays = {name: np.array(fields[name]) for name in ("candidates", "score", "log_probability", "fitness")}
    spread = float("nan") if fields["spread"] is None else fields["spread"]
    return SearchGeneration(**arrays, spread=spread, seconds=fields["seconds"])


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
