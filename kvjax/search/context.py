"""Search context: one model and three sets of samples, each prefilled when it is first needed, to evaluate on."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax import models
from kvjax.attention.eviction import Observation
from kvjax.engine.text.tokenizer import Tokenizer
from kvjax.eval.tasks import find_task
from kvjax.models import Decoder
from kvjax.search.allocators.allocator import Problem
from kvjax.search.config import SearchConfig
from kvjax.search.evaluators.evaluator import Evaluator, Reader, mean_entropy, read_blocks
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedReader, streaming_order
from kvjax.search.evaluators.ray_actors import RayEvaluator
from kvjax.search.evaluators.scores import Scores
from kvjax.search.evaluators.stages import StageEvaluator, StageReader
from kvjax.search.objective import Objective
from kvjax.search.samples import SampleSets, SetName, draw_sets
from kvjax.search.spaces import Candidate, StageSpace

# fields that change neither the samples nor their prefill
_MAY_DIFFER = (
    "token_budget", "allocator", "mode", "evaluations", "group_layers", "measure", "compare", "seed", "warm_start",
    "expand", "runs", "output",
)  # fmt: skip


class SearchContext:
    """Evaluates candidates on the samples of a config.

    Args:
        model, encode, sets: the config's model, its tokenizer and samples of its tasks, where they are there already.

    Attributes:
        windows: the sliding window of each layer, None where a layer has a budget; `layers` are those.
        longest: tokens of the longest prompt.
        problem: as allocators see it.
    """

    def __init__(
        self,
        config: SearchConfig,
        model: Decoder | None = None,
        encode: Callable[[str], list[int]] | None = None,
        sets: SampleSets | None = None,
    ) -> None:
        self.model = models.load(config.model, dtype=jnp.float32) if model is None else model
        self.windows = tuple(kind.window for kind in self.model.config.layers)
        if sets is None:
            counts = (config.samples, config.selection, config.test)
            tasks = [find_task(name) for name in config.tasks]
            encode = encode or Tokenizer.from_pretrained(config.model).encode
            sets = draw_sets(tasks, encode, config.length, counts, query_aware=config.query_aware)
        self.sets = sets
        self.config, self.objective = config, _objective(config)
        self.layers = [layer for layer, window in enumerate(self.windows) if window is None]
        self.longest = max(len(case.prompt) for case in sets.all)
        self._tail = max(len(case.tail) for case in sets.all)
        self._blocks: dict[SetName, list[Any]] = {}
        space = config.space(layers=len(self.layers), kv_heads=self.model.config.num_kv_heads, longest=self.longest)
        self.reader: Reader
        self.evaluator: Evaluator
        if isinstance(space, StageSpace):
            self.reader = StageReader(self.model, space.stages)
            self.evaluator = StageEvaluator(self.model, space.stages, batch=config.batch)
        else:
            eviction = Observation(config.window, config.kernel, config.sinks)
            self.reader = RankedReader(self.model, eviction, self.longest)
            remote = _actors(config, model) if config.actors else None
            self.evaluator = remote or PopulationEvaluator(self.model, batch=config.batch)
        self.problem = Problem(space, mean_entropy(self.blocks("search"))[self.layers])

    def evaluate(self, name: SetName, candidates: Int[np.ndarray, "P N"]) -> Scores:
        """Scores of every candidate on every sample of a set."""
        rows = self.problem.space.by_layer(candidates)
        return self.evaluator.evaluate(rows, self.blocks(name), len(getattr(self.sets, name)))

    def scores(self, name: SetName, candidates: Sequence[Candidate | None]) -> Float[np.ndarray, "P 2 S"]:
        """Score and log-probability of each sample by candidates; None is the full cache."""
        rows = [self.problem.space.full if candidate is None else candidate for candidate in candidates]
        return self._scores(self.evaluate(name, np.array(rows, np.int64)))

    def streaming(self, name: SetName) -> Float[np.ndarray, "2 S"]:
        """Score and log-probability of each sample by StreamingLLM: uniform budgets, spent on first and last tokens."""
        blocks = [streaming_order(block, self.config.sinks) for block in self.blocks(name)]
        uniform = np.full((1, len(self.layers)), self.config.token_budget)
        single = PopulationEvaluator(self.model, batch=1)  # compiles a batch of its own, where it is compared only
        return self._scores(single.evaluate(uniform, blocks, len(getattr(self.sets, name))))[0]

    def again(self, config: SearchConfig) -> "SearchContext":
        """This context for another search on the same samples, whose prompts are not read anew.

        Raises:
            ValueError: the other config has other samples, or prefills them otherwise.
        """
        expected = dataclasses.replace(self.config, **{name: getattr(config, name) for name in _MAY_DIFFER})
        if expected != config:
            raise ValueError(f"{config} does not read what {self.config} has read: only {_MAY_DIFFER} may differ")
        other = copy.copy(self)
        other.config, other.objective = config, _objective(config)
        space = config.space(layers=len(self.layers), kv_heads=self.model.config.num_kv_heads, longest=self.longest)
        other.problem = Problem(space, self.problem.entropy)
        return other

    def close(self) -> None:
        """Closes the evaluator, and so ends its actors, where it has some."""
        self.evaluator.close()

    def blocks(self, name: SetName) -> list[Any]:
        """The prefilled samples of one set, made when they are first needed."""
        if name not in self._blocks:
            cases = getattr(self.sets, name)
            self._blocks[name] = read_blocks(self.reader, self.evaluator, cases, self.longest, self._tail)
        return self._blocks[name]

    def _scores(self, scores: Scores) -> Float[np.ndarray, "P 2 S"]:
        return np.stack([self.objective.score(scores), scores.log_probability], axis=1).astype(np.float64)


def _objective(config: SearchConfig) -> Objective:
    return Objective(
        config.measure, config.mode == "paper", config.token_budget, of_group=config.cache_score == "group"
    )


def _actors(config: SearchConfig, model: Decoder | None) -> RayEvaluator:
    if model is not None:
        raise ValueError(f"actors={config.actors} load the model from {config.model} themselves: pass no model")
    return RayEvaluator(config.model, actors=config.actors, batch=config.batch)
