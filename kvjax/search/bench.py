"""Where schemes are judged: one model, three sets of samples, each read when it is first needed."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax import models
from kvjax.attention.stage1 import Observation
from kvjax.eval.tasks import find_task
from kvjax.models import Decoder
from kvjax.search.allocator import Problem
from kvjax.search.config import SearchConfig
from kvjax.search.evaluation import BLOCK, Evaluator, Scores
from kvjax.search.objective import Objective
from kvjax.search.reading import Reader, Readings
from kvjax.search.samples import Case, SampleSets, SetName, draw_sets
from kvjax.search.space import Scheme, Space


class Bench:
    """Judges schemes on the samples of a config.

    Args:
        model, encode, sets: the config's model, its tokenizer and samples of its tasks, where they are there already.

    Attributes:
        windows: the sliding window of each layer, None where a layer has a budget.
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
            sets = draw_sets(tasks, encode or _tokenizer(config), config.length, counts, aware=config.aware)
        self.sets = sets
        self.objective = Objective(config.measure, config.mode == "paper", config.token_budget)
        self.evaluator = Evaluator(self.model, batch=config.batch)
        self._longest = max(len(case.prompt) for case in sets.all)
        self._tail = max(len(case.tail) for case in sets.all)
        self._reader = Reader(self.model, Observation(config.window, config.kernel, config.sinks), self._longest)
        self._blocks: dict[str, list[Readings]] = {}
        layers, floor = self.evaluator.layers, config.window + config.sinks
        space = Space(len(layers), config.token_budget, floor, self._longest, config.group_layers)
        entropy = np.concatenate([np.asarray(block.entropy) for block in self._read("search")])
        self.problem = Problem(space, entropy[: len(sets.search)].mean(axis=0)[layers])

    def judge(self, name: SetName, schemes: Int[np.ndarray, "P L"]) -> Scores:
        """Of every scheme on every sample of a set."""
        return self.evaluator(schemes, self._read(name), len(getattr(self.sets, name)))

    def scores(self, name: SetName, scheme: Scheme | None) -> Float[np.ndarray, "2 S"]:
        """Score and log-probability of each sample; with the full cache where there is no scheme."""
        space = self.problem.space
        kept = (space.ceiling,) * space.layers if scheme is None else scheme
        scores = self.judge(name, np.array([kept], np.int64))
        return np.stack([self.objective.score(scores)[0], scores.log_probability[0]]).astype(np.float64)

    def _read(self, name: SetName) -> list[Readings]:
        if name not in self._blocks:
            cases: tuple[Case, ...] = getattr(self.sets, name)
            read = [
                self._reader.read(cases[first : first + BLOCK], self._longest, self._tail)
                for first in range(0, len(cases), BLOCK)
            ]
            self._blocks[name] = [block for readings in read for block in self.evaluator.place(readings)]
        return self._blocks[name]


def _tokenizer(config: SearchConfig) -> Callable[[str], list[int]]:
    from kvjax.engine.tokenizer import Tokenizer

    return Tokenizer.from_pretrained(config.model).encode
