"""A search from a config to a result: run the allocators, choose on unseen samples, test on others."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from kvjax.budget import BudgetProfile, ModelFingerprint
from kvjax.eval.metrics import mean_interval
from kvjax.models import Decoder
from kvjax.search.allocator import Allocator
from kvjax.search.bench import Bench
from kvjax.search.checkpoint import Checkpoint
from kvjax.search.config import SearchConfig
from kvjax.search.evolution import Evolution
from kvjax.search.generation import AllocatorRun, Generation
from kvjax.search.heuristics import ANCHORS, Greedy, RandomSearch
from kvjax.search.result import FULL, Outcome, SearchResult, SetScore, plain
from kvjax.search.samples import SampleSets, SetName
from kvjax.search.space import Scheme, Space
from kvjax.store.digest import weights_digest

FINALISTS = 8  # schemes of an allocator that are compared on the selection set
SAVE_EVERY = 5.0  # seconds between two checkpoints
PACKAGES = ("jax", "jaxlib", "evosax", "flax", "numpy")
SETS: tuple[SetName, ...] = ("search", "selection", "test")


class Search:
    """One search. Iterating judges the next generation of the config's allocator, from where it was left.

    Args:
        model, encode, sets: as `Bench`.
        fresh: forget what an earlier run has saved.

    Raises:
        ValueError: the tasks do not fit the length, or another search is saved in the folder of runs.
    """

    def __init__(
        self,
        config: SearchConfig,
        *,
        model: Decoder | None = None,
        encode: Callable[[str], list[int]] | None = None,
        sets: SampleSets | None = None,
        fresh: bool = False,
    ) -> None:
        self.config = config
        self.bench = Bench(config, model, encode, sets)
        self.space = self.bench.problem.space
        self._weights = weights_digest(config.model) if (config.model / "config.json").exists() else None
        self.runs: dict[str, AllocatorRun] = {}
        if fresh and config.runs is not None:
            for name in (config.allocator, "greedy", *(anchor.name for anchor in ANCHORS), *config.compare):
                Checkpoint(config.runs / name, {}).remove()
        self.run = self._begin(config.allocator)

    def __iter__(self) -> Iterator[Generation]:
        with self._saved(self.run) as save:
            for generation in self.run:
                save(False)
                yield generation

    def __enter__(self) -> "Search":
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.close()

    def allocator(self, name: str) -> Allocator:
        """The allocator of that name, with the config's settings."""
        config = self.config
        for anchor in ANCHORS:
            if anchor.name == name:
                return anchor
        if name == "greedy":
            return Greedy()
        if name == "random":
            return RandomSearch(config.evaluations * len(self.space.groups))
        start, spent = self._start(), self._warm_up_evaluations
        return Evolution(config.mode, max(config.evaluations - spent // len(self.space.groups), 1), start=start)

    def result(self, progress: Callable[[str], None] = lambda _: None) -> SearchResult:
        """Finishes what is compared, chooses on the selection set, and tests.

        Args:
            progress: told what is being done.
        """
        for name in (self.config.allocator, *self._anchors, *self.config.compare):
            progress(f"running {name}")
            self._finished(name)
        progress("choosing on the selection set, testing")
        uniform = self.bench.scores("test", self.space.uniform)
        outcomes = {FULL: self._outcome(FULL, None, uniform)}
        for name, run in self.runs.items():
            extra = self._warm_up_evaluations if name == "evolution" else 0
            outcomes[name] = self._outcome(name, self._best(run), uniform, run, extra)
        own, even = outcomes[self.config.allocator].selection, outcomes["uniform"].selection
        wins = (own.mean, own.log_probability) >= (even.mean, even.log_probability)
        chosen = outcomes[self.config.allocator if wins else "uniform"]
        kept = np.array(chosen.scheme)
        return SearchResult(
            config=self.config,
            model=ModelFingerprint.of(self.bench.model.config, self._weights),
            windows=self.bench.windows,
            longest=self.bench.longest,
            context=self.bench.model.config.max_position,
            chosen=chosen,
            outcomes=tuple(outcomes.values()),
            expanded={mean: self._expand(kept, mean) for mean in self.config.expand},
            history=tuple(self.run.history),
            versions=_versions(),
        )

    def _begin(self, name: str) -> AllocatorRun:
        judge = functools.partial(self.bench.judge, "search")
        run = AllocatorRun(self.allocator(name), self.bench.problem, self.bench.objective, judge, self.config.seed)
        self.runs[name] = run
        return run

    @property
    def _warm_up_evaluations(self) -> int:
        """What evolution owes to the allocator that it begins with."""
        warmed = self.config.allocator == "evolution" and self.config.warm_start == "greedy"
        return self.runs["greedy"].evaluations if warmed and isinstance(self.space, Space) else 0

    def _finished(self, name: str) -> AllocatorRun:
        run = self.runs.get(name) or self._begin(name)
        with self._saved(run) as save:
            for _ in run:
                save(False)
        return run

    @contextlib.contextmanager
    def _saved(self, run: AllocatorRun) -> Iterator[Callable[[bool], None]]:
        """Brings back what was saved of a run, lets it be saved from time to time, and saves it when it is left."""
        if self.config.runs is None:
            yield lambda _: None
            return
        checkpoint = Checkpoint(self.config.runs / run.allocator.name, self._identity())
        if not run.history and (found := checkpoint.restore(run.state)) is not None:
            run.state, run.history = found
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
        """What decides every number of a run."""
        left_out = ("model", "runs", "output", "actors", "compare", "expand", "room", "selection", "test")
        fields = {name: value for name, value in plain(self.config).items() if name not in left_out}
        return fields | {"weights": self._weights, "versions": _versions()}

    def _best(self, run: AllocatorRun) -> Scheme:
        """Of a run's best schemes the one that does best on samples it was not chosen for."""
        finalists = run.finalists(FINALISTS)
        objective = dataclasses.replace(self.bench.objective, paper=False)
        fitness = objective(finalists, self.bench.judge("selection", finalists))
        return tuple(int(kept) for kept in finalists[int(np.argmax(fitness))])

    def _outcome(
        self,
        name: str,
        scheme: Scheme | None,
        uniform: Float[np.ndarray, "2 S"],
        run: AllocatorRun | None = None,
        extra: int = 0,
    ) -> Outcome:
        sets: dict[str, SetScore] = {}
        gain = (0.0, 0.0, 0.0)
        for each in SETS:
            scores = self.bench.scores(each, scheme)
            sets[each] = SetScore(*mean_interval(scores[0].tolist()), float(scores[1].mean()), scores.shape[1])
            if each == "test":  # a difference of two scores lies in [-1, 1]; paired by sample
                middle, low, high = mean_interval(((scores[0] - uniform[0] + 1) / 2).tolist())
                gain = (2 * middle - 1, 2 * low - 1, 2 * high - 1)
        history = [] if run is None else run.history
        evaluations = extra + sum(len(generation.schemes) for generation in history)
        spent = math.fsum(generation.seconds for generation in history)
        return Outcome(name, scheme, **sets, gain=gain, evaluations=evaluations, seconds=spent)

    @property
    def _anchors(self) -> tuple[str, ...]:
        """The rules that stand beside every search of this kind."""
        return tuple(each.name for each in (ANCHORS if isinstance(self.space, Space) else ANCHORS[:1]))

    def _expand(self, scheme: Int[np.ndarray, "L"], mean: int) -> Scheme:
        return dataclasses.replace(self.bench.problem.tokens, mean=mean).completed(scheme)

    def _start(self) -> tuple[float, ...] | None:
        """Shares beyond the floor, of mean 1, that evolution begins with; None for equal ones."""
        begin = self.config.warm_start
        if begin == "uniform" or not isinstance(self.space, Space):
            return None
        if begin == "greedy":
            kept = np.array(self._finished("greedy").finalists(1)[0])
        else:
            layers = BudgetProfile.load(begin, ModelFingerprint.of(self.bench.model.config, self._weights)).layers
            kept = np.array([layers[layer].capacity for layer in self.bench.layers]) - self.config.room
        beyond = np.maximum(kept - self.bench.problem.tokens.floor, 0)
        return tuple(float(share) for share in beyond / max(beyond.mean(), 1e-9))


def search(
    config: SearchConfig,
    *,
    model: Decoder | None = None,
    encode: Callable[[str], list[int]] | None = None,
    sets: SampleSets | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> SearchResult:
    """Finds how many tokens each layer should keep, and says how good that is on samples it has never seen.

    Ctrl-C leaves a checkpoint where the config names a folder for it, and the next call goes on from there.

    Args:
        model, encode, sets, fresh: as `Search`.
        progress: show a bar with the best score, the mean budget and sigma.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=None, unit="scheme", disable=not progress))
        bar.set_description("reading prompts")
        its = stack.enter_context(Search(config, model=model, encode=encode, sets=sets, fresh=fresh))
        bar.set_description(f"{config.allocator}, {config.token_budget} tokens a layer")
        if config.allocator in ("evolution", "random"):
            bar.reset(total=config.evaluations * len(its.space.groups))
        for generation in its:
            bar.update(its.run.evaluations - bar.n)
            best = max(float(each.score.max()) for each in its.run.history)
            spread = "" if np.isnan(generation.spread) else f", sigma {generation.spread:.2f}"
            bar.set_postfix_str(f"best {best:.1%}, mean {generation.score.mean():.1%}{spread}", refresh=False)
        result = its.result(bar.set_description)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        result.save(config.output)
    return result


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
