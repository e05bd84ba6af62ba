"""A small search without a model: samples that need so many tokens of each layer, the middle layers most."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from kvjax.budget import ModelFingerprint
from kvjax.search.allocators.allocator import Allocator, Fixed, Problem
from kvjax.search.allocators.evolution import Evolution
from kvjax.search.allocators.greedy import Greedy
from kvjax.search.allocators.rules import ANCHORS
from kvjax.search.config import SearchConfig
from kvjax.search.evaluators.scores import Scores
from kvjax.search.generation import AllocatorRun
from kvjax.search.objective import Objective
from kvjax.search.outcome import FULL, SETS, Outcome
from kvjax.search.result import SearchResult
from kvjax.search.spaces import Candidate, TokenSpace

CEILING = 480


@dataclasses.dataclass(frozen=True, eq=False)
class Needs:
    """Samples, each right where enough of its needs are met."""

    tokens: np.ndarray  # [samples, layers]

    @classmethod
    def draw(cls, samples: int, layers: int, seed: int) -> "Needs":
        middle = np.exp(-(((np.arange(layers) - 0.4 * layers) / (0.2 * layers)) ** 2))
        return cls((8 + 150 * middle) * np.random.default_rng(seed).lognormal(0, 0.6, (samples, layers)))

    def __call__(self, candidates: np.ndarray) -> Scores:
        met = np.minimum(1.0, candidates[:, None] / self.tokens).mean(axis=-1).astype(np.float32)
        return Scores((met > 0.9).astype(np.float32), met, np.log(met))

    def score(self, candidate: np.ndarray) -> np.ndarray:
        """Score and log-probability of each sample."""
        scores = self(candidate[None])
        return np.concatenate([scores.exact, scores.log_probability]).astype(np.float64)


@functools.cache
def search_result(
    token_budget: int = 64, *, layers: int = 8, sliding: bool = False, allocator: Allocator | None = None
) -> SearchResult:
    """The result of a search over such samples, compared with the anchors; every second layer slides, if asked for."""
    allocator = allocator or Evolution(evaluations=120)
    name = "greedy" if isinstance(allocator, Greedy) else "evolution"
    config = SearchConfig(
        model=Path("models/kvjax_small"),
        tasks=("mini/niah_single_2", "mini/vt"),
        token_budget=token_budget,
        allocator=name,
        evaluations=120,
        samples=32,
        selection=64,
        test=128,
        expand=(2 * token_budget,),
    )
    windows = (None, 16) * layers if sliding else (None,) * layers
    sets = [Needs.draw(count, layers, seed) for seed, count in enumerate((32, 64, 128))]
    empty = SearchResult(
        config=config,
        model=ModelFingerprint("qwen3", len(windows), 2, 32, "0123"),
        windows=windows,
        longest=CEILING,
        context=4096,
        chosen=_outcome(FULL, None, layers, token_budget, sets),
        outcomes=(),
        expanded={},
        history=(),
        versions={"jax": "0.11.2"},
    )
    space = TokenSpace(layers, token_budget, config.window + config.sinks, CEILING)
    problem = Problem(space, np.linspace(1.0, 3.0, layers))
    run = AllocatorRun(allocator, problem, Objective(), sets[0], seed=0)
    for _ in run:
        pass
    searched = _outcome(name, _tuple(run.finalists(1)[0]), layers, token_budget, sets, run.evaluations)
    anchors = [_outcome(rule.name, _candidate(rule, problem), layers, token_budget, sets) for rule in ANCHORS]
    chosen = max(searched, anchors[0], key=lambda outcome: outcome.selection.mean)
    return dataclasses.replace(
        empty,
        chosen=chosen,
        outcomes=(empty.chosen, *anchors, searched),
        expanded={
            2 * token_budget: tuple(
                _outcome(
                    each.name, tuple(2 * retained for retained in each.candidate or ()), layers, 2 * token_budget, sets
                )
                for each in dict.fromkeys((anchors[0], chosen))
            )
        },
        history=tuple(run.history),
    )


def _candidate(rule: Fixed, problem: Problem) -> Candidate:
    return _tuple(np.array(rule.candidate(problem)))


def _tuple(candidate: np.ndarray) -> Candidate:
    return tuple(int(retained) for retained in candidate)


def _outcome(
    name: str, candidate: Candidate | None, layers: int, mean: int, sets: list[Needs], evaluations: int = 1
) -> Outcome:
    retained = np.array(candidate or (CEILING,) * layers)
    scores = dict(zip(SETS, (needs.score(retained) for needs in sets), strict=True))
    uniform = sets[2].score(np.full(layers, mean))[0]
    return Outcome.of(name, candidate, scores, uniform, evaluations, 0.05 * evaluations)
