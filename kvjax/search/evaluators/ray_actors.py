"""Ray evaluator: scores candidates in actors, on this machine or many, each of which holds the model.

    caller                                     actors, each with a `PopulationEvaluator`
    place ----- prompts, once ---> object store ---- pulled at first use, then kept ---> devices
    evaluate -- an even share of the candidates, in order ---------------------------------> evaluated
          <--- scores, joined in that order --------------------------------------------

Prompts are read by the caller alone and shipped as arrays: that takes the time of a copy where reading them takes that
of a prefill, and all actors evaluate on the same bits.
"""

import dataclasses
import importlib
import itertools
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kvjax import models
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedPrompts
from kvjax.search.evaluators.scores import Scores, check_candidates


@dataclasses.dataclass(frozen=True, eq=False)
class ShippedPrompts:
    """Prompts in Ray's object store. They are dropped everywhere when the last of this is.

    Attributes:
        key: by which actors know what they have pulled.
        reference: Ray's.
        entropy: of the prompts.
    """

    key: int
    reference: Any
    entropy: Float[np.ndarray, "S L"]


class RayEvaluator:
    """`PopulationEvaluator` with a population split over Ray actors. Needs the extra `ray`.

    Scores are those of `PopulationEvaluator` with the same batch to the bit, on devices of the same kind: the same
    compiled function evaluates, and a candidate's numbers do not depend on those beside it. With another batch they
    round otherwise.

    An actor that dies is replaced, and its share evaluated again; not so if that one dies too. Connects to the cluster
    that RAY_ADDRESS names, or starts a local one, unless this process is connected already. Not for several threads.

    Args:
        folder: of the model, under this path on every machine.
        actors: how many.
        batch: candidates that an actor evaluates at a time; fewer are padded, so best a population's share of an actor.
        dtype: of the model.
        options: of every actor, as Ray has them: `{"num_gpus": 1}`. A CPU core each by default.
        patience: seconds within which actors must have loaded the model.

    Attributes:
        layers: those of the model with a budget.
        evaluations: candidates evaluated so far, each time on a whole set.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: an actor cannot load the model.
        TimeoutError: the cluster has no place for the actors.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        actors: int = 2,
        batch: int = 16,
        dtype: jax.typing.DTypeLike = jnp.float32,
        options: Mapping[str, Any] | None = None,
        patience: int | float = 600,
    ) -> None:
        if min(actors, batch) < 1:
            raise ValueError(f"actors={actors} and batch={batch} must be at least 1")
        try:
            self._ray = importlib.import_module("ray")
        except ImportError as error:
            raise ImportError(
                "no Ray: install kvjax with its extra `ray`, or evaluate with PopulationEvaluator"
            ) from error
        self._options = {"num_cpus": 1} | dict(options or {})
        self._arguments = os.path.abspath(folder), np.dtype(dtype).name, batch
        self._patience = patience
        self._dead = self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError
        self._keys = itertools.count()
        self._alive: weakref.WeakValueDictionary[int, ShippedPrompts] = weakref.WeakValueDictionary()
        self.evaluations = 0
        self._actors: list[Any] = []
        self._owner = not self._ray.is_initialized()
        if self._owner:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's, but Ray forks to exec
                self._ray.init()
        try:
            self._actors += [self._start() for _ in range(actors)]
            self.layers = self._loaded(self._actors)
        except BaseException:
            self.close()
            raise

    def place(self, prompts: RankedPrompts) -> list[ShippedPrompts]:
        """Prompts in the object store, where every actor can get them."""
        arrays = jax.tree.map(np.asarray, prompts)
        shipped = ShippedPrompts(next(self._keys), self._ray.put(arrays), arrays.entropy)
        self._alive[shipped.key] = shipped
        return [shipped]

    def evaluate(self, candidates: Int[np.ndarray, "P L *n"], blocks: list[ShippedPrompts], samples: int) -> Scores:
        """Scores of every candidate on the first `samples` samples of blocks, as `PopulationEvaluator` gives them.

        Raises:
            RuntimeError: an actor died, and so did the one that took its place.
        """
        check_candidates(candidates, len(self.layers))
        if not self._actors:
            raise RuntimeError("this evaluator was closed: make another")
        self.evaluations += len(candidates)
        needed = [(block.key, block.reference) for block in blocks]  # in a list Ray passes references on as such
        rest = needed, list(self._alive), samples
        shares = [share for share in np.array_split(candidates, len(self._actors)) if len(share)]
        pending = [actor.evaluate.remote(share, *rest) for actor, share in zip(self._actors, shares, strict=False)]
        parts: list[Scores] = []
        for number, (share, evaluated) in enumerate(zip(shares, pending, strict=True)):
            try:
                parts.append(self._ray.get(evaluated))
            except self._dead:
                parts.append(self._again(number, share, rest))
        return Scores(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Scores))
        )

    def close(self) -> None:
        """Ends the actors, and Ray if this has started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._owner:
            self._ray.shutdown()

    def __enter__(self) -> "RayEvaluator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Any:
        return self._ray.remote(_Worker).options(**self._options).remote(*self._arguments)

    def _loaded(self, actors: list[Any]) -> list[int]:
        """Waits until actors have the model: its layers with a budget."""
        try:
            return self._ray.get([actor.layers.remote() for actor in actors], timeout=self._patience)[0]
        except self._ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(
                f"{len(actors)} actors with {self._options} did not load {self._arguments[0]} within {self._patience} "
                f"s; the cluster has {self._ray.cluster_resources()}: ask for fewer or smaller ones, or wait longer"
            ) from error
        except self._dead as error:
            raise RuntimeError(
                f"an actor could not load {self._arguments[0]}, see above: every machine of the cluster needs that "
                "folder, kvjax, and memory for the model"
            ) from error

    def _again(self, number: int, share: np.ndarray, rest: tuple[Any, ...]) -> Scores:
        """A share of candidates evaluated by a new actor in the place of one that died."""
        self._ray.kill(self._actors[number])  # it may be out of reach only
        self._actors[number] = self._start()
        self._loaded([self._actors[number]])
        try:
            return self._ray.get(self._actors[number].evaluate.remote(share, *rest))
        except self._dead as error:
            raise RuntimeError(
                f"an actor died while it evaluated {len(share)} candidates, and so did the one that took its place. "
                f"Most often that is memory: evaluate fewer at a time than batch={self._arguments[2]}, start fewer "
                "actors on a machine, or give them more (options); `ray logs` has their last words"
            ) from error


class _Worker:
    """The object in an actor: a model, and the blocks it has pulled."""

    def __init__(self, folder: str, dtype: str, batch: int) -> None:
        self._evaluator = PopulationEvaluator(models.load(folder, dtype=jnp.dtype(dtype)), batch=batch)
        self._placed: dict[int, list[RankedPrompts]] = {}

    def layers(self) -> list[int]:
        return self._evaluator.layers

    def evaluate(self, candidates: np.ndarray, needed: list[tuple[int, Any]], alive: list[int], samples: int) -> Scores:
        """Scores of candidates; what is not alive any more is dropped."""
        self._placed = {key: blocks for key, blocks in self._placed.items() if key in alive}
        for key, reference in needed:
            if key not in self._placed:
                self._placed[key] = self._evaluator.place(importlib.import_module("ray").get(reference))
        blocks = [block for key, _ in needed for block in self._placed[key]]
        return self._evaluator.evaluate(candidates, blocks, samples)
