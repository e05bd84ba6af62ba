"""Where candidates are evaluated: one model, three sets of samples, each read when it is first needed."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax import models
from kvjax.attention.eviction import Observation
from kvjax.eval.tasks import find_task
from kvjax.models import Decoder
from kvjax.search.allocator import Problem
from kvjax.search.config import SearchConfig
from kvjax.search.evaluation import Evaluator
from kvjax.search.evaluators import Evaluators, TokenEvaluators
from kvjax.search.objective import Objective
from kvjax.search.ray_evaluator import RayEvaluator
from kvjax.search.reading import Reader, streaming_order
from kvjax.search.samples import SampleSets, SetName, draw_sets
from kvjax.search.scores import Scores
from kvjax.search.space import Candidate, Space
from kvjax.search.stage_space import StageSpace
from kvjax.search.stages import StageEvaluators, Stages

# what changes neither the samples nor how they are read
_MAY_DIFFER = (
    "token_budget", "allocator", "mode", "evaluations", "group_layers", "measure", "compare", "seed", "warm_start",
    "expand", "runs", "output",
)  # fmt: skip


class SearchContext:
    """Judges candidates on the samples of a config.

    Args:
        model, encode, sets: the config's model, its tokenizer and samples of its tasks, where they are there already.

    Attributes:
        windows: the sliding window of each layer, None where a layer has a budget; `layers` are those.
        longest: tokens of the longest prompt.
        problem: what allocators may know.
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
            sets = draw_sets(tasks, encode or _tokenizer(config), config.length, counts, query_aware=config.query_aware)
        self.sets = sets
        self.config, self.objective = config, _objective(config)
        self.layers = [layer for layer, window in enumerate(self.windows) if window is None]
        longest = self.longest = max(len(case.prompt) for case in sets.all)
        tail = max(len(case.tail) for case in sets.all)
        self._read: dict[SetName, Any] = {}
        self._ray: RayEvaluator | None = None
        if config.search == "rocketkv":
            stages = Stages(config.window, config.sinks, headroom=config.headroom)
            self.evaluator: Evaluators = StageEvaluators(self.model, stages, longest, tail, batch=config.batch)
            space: Space | StageSpace = StageSpace(
                len(self.layers),
                config.token_budget,
                longest + config.headroom,
                stages,
                group_layers=config.group_layers,
            )
        else:
            heads = self.model.config.num_kv_heads if config.search == "heads" else 1
            reader = Reader(self.model, Observation(config.window, config.kernel, config.sinks), longest)
            self._ray = _actors(config, model) if config.actors else None
            evaluator = self._ray or Evaluator(self.model, batch=config.batch)
            self.evaluator = TokenEvaluators(reader, evaluator, longest, tail, heads)
            floor = config.window + config.sinks
            space = Space(len(self.layers), config.token_budget, floor, longest, config.group_layers, heads)
        self.problem = Problem(space, self.evaluator.entropy(self._blocks("search"))[self.layers])

    def evaluate(self, name: SetName, candidates: Int[np.ndarray, "P N"]) -> Scores:
        """Of every candidate on every sample of a set."""
        return self.evaluator.evaluate(candidates, self._blocks(name), len(getattr(self.sets, name)))

    def scores(self, name: SetName, candidates: Sequence[Candidate | None]) -> Float[np.ndarray, "P 2 S"]:
        """Score and log-probability of each sample by candidates; None is the full cache."""
        rows = [self.evaluator.full if candidate is None else candidate for candidate in candidates]
        return self._scores(self.evaluate(name, np.array(rows, np.int64)))

    def streaming(self, name: SetName) -> Float[np.ndarray, "2 S"]:
        """The same where all layers keep as many as by uniform budgets, but the first tokens and the last."""
        blocks = [streaming_order(block, self.config.sinks) for block in self._blocks(name)]
        uniform = np.full((1, len(self.layers)), self.config.token_budget)
        one = Evaluator(self.model, batch=1)  # compiles a batch of its own, but only where this is asked for
        return self._scores(one(uniform, blocks, len(getattr(self.sets, name))))[0]

    def again(self, config: SearchConfig) -> "SearchContext":
        """This bench for another search on the same samples, whose prompts need not be read anew.

        Raises:
            ValueError: the other config asks for other samples, or reads them otherwise.
        """
        theirs = dataclasses.replace(self.config, **{name: getattr(config, name) for name in _MAY_DIFFER})
        if theirs != config:
            raise ValueError(f"{config} does not read what {self.config} has read: only {_MAY_DIFFER} may differ")
        other = copy.copy(self)
        other.config, other.objective = config, _objective(config)
        space = dataclasses.replace(self.problem.space, mean=config.token_budget, group_layers=config.group_layers)
        other.problem = Problem(space, self.problem.entropy)
        return other

    def close(self) -> None:
        """Ends the Ray actors, where there are any."""
        if self._ray is not None:
            self._ray.close()

    def _scores(self, scores: Scores) -> Float[np.ndarray, "P 2 S"]:
        return np.stack([self.objective.score(scores), scores.log_probability], axis=1).astype(np.float64)

    def _blocks(self, name: SetName) -> Any:
        """The readings of one set, made when they are first needed."""
        if name not in self._read:
            self._read[name] = self.evaluator.read(getattr(self.sets, name))
        return self._read[name]


def _objective(config: SearchConfig) -> Objective:
    return Objective(
        config.measure, config.mode == "paper", config.token_budget, of_group=config.cache_score == "group"
    )


def _actors(config: SearchConfig, model: Decoder | None) -> RayEvaluator:
    if model is not None:
        raise ValueError(f"actors={config.actors} load the model from {config.model} themselves: pass no model")
    return RayEvaluator(config.model, actors=config.actors, batch=config.batch)


def _tokenizer(config: SearchConfig) -> Callable[[str], list[int]]:
    from kvjax.engine.text.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(config.model).encode
