"""Search, from a config to a result: runs the allocators, chooses on unseen samples, tests on others."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.models import Decoder
from kvjax.search.allocators.allocator import Allocator, Fixed
from kvjax.search.allocators.evolution import Evolution
from kvjax.search.allocators.greedy import FineGreedy, Greedy
from kvjax.search.allocators.random_search import RandomSearch
from kvjax.search.allocators.rules import ANCHORS
from kvjax.search.checkpoint import Checkpoint
from kvjax.search.config import STREAMING, SearchConfig
from kvjax.search.context import SearchContext
from kvjax.search.generation import AllocatorRun, SearchGeneration
from kvjax.search.outcome import FULL, SETS, Outcome
from kvjax.search.result import SearchResult, plain
from kvjax.search.samples import SampleSets, SetName
from kvjax.search.spaces import Candidate
from kvjax.store.digest import weights_digest

FINALISTS = 8  # candidates of an allocator that are compared on the selection set
SAVE_EVERY = 5.0  # seconds between two checkpoints
PACKAGES = ("jax", "jaxlib", "evosax", "flax", "numpy")

Evaluated = dict[SetName, Float[np.ndarray, "2 _S"]]  # score and log-probability of each sample


class Search:
    """One search. Iterating evaluates the config's allocator generation by generation, from where it was left.

    Args:
        model, encode, sets: as `SearchContext`.
        context: of another search on the same samples, instead of those.
        fresh: delete the checkpoints of an earlier run.
        resume_from: the result of a search whose config differs in nothing but fewer `evaluations`. Its generations
            are not evaluated again, and checkpoints are neither read nor written.
        made_by: the command that searches, as it will stand in the profile.

    Raises:
        ValueError: the tasks do not fit the length, the folder of runs has checkpoints of another search, or
            `resume_from` is of another search.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        model: Decoder | None = None,
        encode: Callable[[str], list[int]] | None = None,
        sets: SampleSets | None = None,
        context: SearchContext | None = None,
        fresh: bool = False,
        resume_from: SearchResult | None = None,
        made_by: str = SearchResult.made_by,
    ) -> None:
        config = config if resume_from is None else dataclasses.replace(config, runs=None)
        self.config, self._made_by = config, made_by
        self._owner = context is None
        self.context = SearchContext(config, model, encode, sets) if context is None else context.again(config)
        self.space = self.context.problem.space
        self._spaces = {mean: dataclasses.replace(self.context.problem.tokens, mean=mean) for mean in config.expand}
        self._weights = weights_digest(config.model) if (config.model / "config.json").exists() else None
        self.runs: dict[str, AllocatorRun] = {}
        if fresh and config.runs is not None:
            for name in (config.allocator, "greedy", *(anchor.name for anchor in ANCHORS), *config.compare):
                Checkpoint(config.runs / name, {}).remove()
        self.run = self._begin(config.allocator)
        self.run.replay(() if resume_from is None else resume_from.history)

    def __iter__(self) -> Iterator[SearchGeneration]:
        with self._saved(self.run) as save:
            for generation in self.run:
                save(False)
                yield generation

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        if self._owner:
            self.context.close()

    def allocator(self, name: str) -> Allocator:
        """The allocator of that name, with the config's settings."""
        config = self.config
        for anchor in ANCHORS:
            if anchor.name == name:
                return anchor
        if name == "greedy":
            return Greedy()
        most = config.evaluations * len(self.space.groups)
        if name == "fine-greedy":
            return FineGreedy(sizes=max((most - 1) // self.space.units, Greedy.sizes))
        if name == "random":
            return RandomSearch(most)
        start, spent = self._start(), sum(len(generation.candidates) for generation in self._warm_up)
        return Evolution(config.mode, max(config.evaluations - spent // len(self.space.groups), 1), start=start)

    def result(self, progress: Callable[[str], None] = lambda _: None) -> SearchResult:
        """Finishes what is compared, chooses on the selection set, and tests.

        Args:
            progress: called with the name of each step.
        """
        for name in (self.config.allocator, *self.config.compare):
            if name != STREAMING:
                progress(f"running {name}")
                self._finished(name)
        progress("choosing on the selection set, testing")
        outcomes = self._outcomes()
        # of equals what was cheaper to find; streaming is no candidate of these budgets but another way to spend them
        chosen = max(
            (each for each in outcomes if each.candidate is not None and each.name != STREAMING),
            key=lambda each: (each.selection.mean, each.selection.log_probability, -each.evaluations),
        )
        progress("testing other budgets")
        return SearchResult(
            config=self.config,
            model=ModelFingerprint.of(self.context.model.config, self._weights),
            windows=self.context.windows,
            longest=self.context.longest,
            context=self.context.model.config.max_position,
            chosen=chosen,
            outcomes=outcomes,
            expanded=self._expanded(chosen),
            history=tuple(self.run.history),
            versions=_versions(),
            made_by=self._made_by,
        )

    def _begin(self, name: str) -> AllocatorRun:
        evaluate = functools.partial(self.context.evaluate, "search")
        run = AllocatorRun(
            self.allocator(name), self.context.problem, self.context.objective, evaluate, self.config.seed
        )
        self.runs[name] = run
        return run

    @property
    def _warm_up(self) -> list[SearchGeneration]:
        """Generations of the allocator that evolution begins with."""
        return self._finished("greedy").history if self.config.begins_with == "greedy" else []

    def _spent(self, name: str) -> list[SearchGeneration]:
        """Generations evaluated for an allocator's outcome; none for rules."""
        own = self.runs[name].history if name in self.runs else []
        return [*self._warm_up, *own] if name == "evolution" else own

    def _finished(self, name: str) -> AllocatorRun:
        run = self.runs.get(name) or self._begin(name)
        with self._saved(run) as save:
            for _ in run:
                save(False)
        return run

    @contextlib.contextmanager
    def _saved(self, run: AllocatorRun) -> Iterator[Callable[[bool], None]]:
        """Restores a run's checkpoint, gives a function that saves it from time to time, and saves it in the end."""
        if self.config.runs is None:
            yield lambda _: None
            return
        checkpoint = Checkpoint(self.config.runs / run.allocator.name, self._identity())
        if not run.history and (saved := checkpoint.restore(run.state)) is not None:
            run.state, run.history = saved
        last = time.monotonic()

        def save(now: bool) -> None:
            nonlocal last
            if now or time.monotonic() - last >= SAVE_EVERY:
                checkpoint.save(run.state, run.history)
                last = time.monotonic()

        try:
            yield save
        finally:
            save(True)

    def _identity(self) -> dict[str, Any]:
        """The values that decide every number of a run."""
        left_out = ("model", "runs", "output", "actors", "compare", "expand", "headroom", "selection", "test")
        fields = {name: value for name, value in plain(self.config).items() if name not in left_out}
        return fields | {"weights": self._weights, "versions": _versions()}

    def _best(self, run: AllocatorRun) -> Candidate:
        """The finalist of a run that does best on the selection set."""
        finalists = run.finalists(FINALISTS)
        if len(finalists) > 1:
            objective = dataclasses.replace(self.context.objective, paper=False)
            fitness = objective(finalists, self.context.evaluate("selection", finalists))
            finalists = finalists[int(np.argmax(fitness)) :]
        return tuple(int(retained) for retained in finalists[0])

    def _outcomes(self) -> tuple[Outcome, ...]:
        """Outcomes of the full cache, the anchors, and every run."""
        candidates: dict[str, Candidate | None] = {FULL: None}
        candidates |= {rule.name: rule.candidate(self.context.problem) for rule in self._anchors}
        candidates |= {name: self._best(run) for name, run in self.runs.items()}
        evaluated = dict(zip(candidates, self._evaluated(list(candidates.values())), strict=True))
        uniform = evaluated["uniform"]["test"][0]
        outcomes: list[Outcome] = []
        for name, candidate in candidates.items():
            history = self._spent(name)
            spent = sum(len(generation.candidates) for generation in history)
            seconds = math.fsum(generation.seconds for generation in history)
            outcomes.append(Outcome.of(name, candidate, evaluated[name], uniform, spent, seconds))
        if STREAMING in self.config.compare:
            streaming: Evaluated = {name: self.context.streaming(name) for name in SETS}
            outcomes.insert(1, Outcome.of(STREAMING, self.space.uniform, streaming, uniform))
        return tuple(outcomes)

    def _evaluated(self, candidates: Sequence[Candidate | None]) -> list[Evaluated]:
        """Each candidate on the three sets; all of them at once, for a batch takes as long however few are in it."""
        scores = {name: self.context.scores(name, candidates) for name in SETS}
        return [{name: scores[name][place] for name in SETS} for place in range(len(candidates))]

    def _expanded(self, chosen: Outcome) -> dict[int, tuple[Outcome, ...]]:
        """Uniform budgets and the chosen proportions at the other token budgets."""
        pairs = {
            mean: (space.uniform, space.completed(np.array(chosen.candidate))) for mean, space in self._spaces.items()
        }
        evaluated = iter(self._evaluated([candidate for pair in pairs.values() for candidate in pair]) if pairs else ())
        expanded: dict[int, tuple[Outcome, ...]] = {}
        for mean, pair in pairs.items():
            both = next(evaluated), next(evaluated)
            names = dict.fromkeys(("uniform", chosen.name))  # one, where nothing was better
            rows = zip(names, pair, both, strict=False)
            expanded[mean] = tuple(
                Outcome.of(name, candidate, scores, both[0]["test"][0]) for name, candidate, scores in rows
            )
        return expanded

    @property
    def _anchors(self) -> tuple[Fixed, ...]:
        """The rules that stand beside every search of this space; uniform is the first."""
        return ANCHORS if self.space.shares_tokens else ANCHORS[:1]

    def _start(self) -> tuple[float, ...] | None:
        """Shares beyond the floor, of mean 1, that evolution begins with; None for equal ones."""
        begin = self.config.begins_with
        if begin == "uniform":
            return None
        if begin == "greedy":
            retained = np.array(self._finished("greedy").finalists(1)[0])
        else:
            layers = BudgetProfile.load(begin, ModelFingerprint.of(self.context.model.config, self._weights)).layers
            retained = np.array([layers[layer].capacity for layer in self.context.layers]) - self.config.headroom
        beyond = np.maximum(retained - self.context.problem.tokens.floor, 0)
        return tuple(float(share) for share in beyond / max(beyond.mean(), 1e-9))


def search(
    config: SearchConfig,
    *,
    model: Decoder | None = None,
    encode: Callable[[str], list[int]] | None = None,
    sets: SampleSets | None = None,
    context: SearchContext | None = None,
    fresh: bool = False,
    resume_from: SearchResult | None = None,
    progress: bool = True,
    made_by: str = SearchResult.made_by,
) -> SearchResult:
    """Finds how many tokens each layer should keep, and scores that on samples which no choice was made by.

    Ctrl-C leaves a checkpoint where the config names a folder for it, and the next call goes on from there. A result
    goes on to more evaluations as `search(dataclasses.replace(config, evaluations=800), resume_from=result)`, and ends
    as one search with 800 at once would.

    Args:
        model, encode, sets, context, fresh, resume_from, made_by: as `Search`.
        progress: show a bar with the best score, the mean budget and sigma.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=None, unit="candidate", disable=not progress))
        bar.set_description("reading prompts")
        running = Search(
            config,
            model=model,
            encode=encode,
            sets=sets,
            context=context,
            fresh=fresh,
            resume_from=resume_from,
            made_by=made_by,
        )
        stack.enter_context(running)
        bar.set_description(f"{config.allocator}, {config.token_budget} tokens a layer")
        if config.allocator in ("evolution", "random"):
            bar.reset(total=config.evaluations * len(running.space.groups))
        for generation in running:
            bar.update(running.run.evaluations - bar.n)
            best = max(float(each.score.max()) for each in running.run.history)
            spread = "" if np.isnan(generation.spread) else f", sigma {generation.spread:.2f}"
            bar.set_postfix_str(f"best {best:.1%}, mean {generation.score.mean():.1%}{spread}", refresh=False)
        result = running.result(bar.set_description)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        result.save(config.output)
    return result


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
