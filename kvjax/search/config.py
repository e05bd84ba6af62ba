"""Search config: frozen data read from YAML. No arrays, no model."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import yaml

from kvjax.search.allocators.evolution import Mode
from kvjax.search.objective import Measure
from kvjax.search.spaces import SPACES, EvictionSettings, SearchSpace, SpaceName

AllocatorName = Literal[
    "evolution", "greedy", "fine-greedy", "random", "uniform", "pyramid", "inverse-pyramid", "entropy"
]
STREAMING = "streaming"  # no allocator: uniform budgets, spent otherwise
_RENAMED = {"room": "headroom", "aware": "query_aware"}  # fields of earlier versions
Compared = AllocatorName | Literal["streaming"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A whole search.

    Attributes:
        model: folder of the model.
        tasks: names of `kvjax.eval.tasks`, drawn from in turn.
        length: tokens of prompt and reply.
        search: 'tokens' that each layer keeps; 'heads', tokens that each kv head keeps; or 'rocketkv', the numbers of
            both stages.
        token_budget: tokens that a layer keeps of a prompt on average (the paper's c); for 'rocketkv' those that a step
            reads.
        allocator: finds the candidate; evolution or random for 'rocketkv'.
        mode: of evolution: 'project' makes every candidate's cost exact, 'paper' punishes cost in the objective.
        cache_score: of mode 'paper': CacheScore is of the whole 'candidate', or of the 'group' of layers that is being
            searched.
        evaluations: candidates evaluated for each group of layers, by evolution and random search.
        group_layers: layers searched together, one group after another.
        measure: 'exact' replies, or the share of 'tokens' for tasks that few replies solve.
        query_aware: the question is in the prompt that is compressed; else it comes after.
        samples, selection, test: sizes of the three sets of samples.
        compare: allocators run beside this one, on the same sets with the same number of evaluations; 'streaming' is
            the last tokens of a prompt in every layer (StreamingLLM).
        window, kernel, sinks: of stage 1: the last tokens, whose queries choose and which stay; the width of
            max-pooling; the first tokens, which stay too.
        headroom: entries that served views keep free for generated tokens.
        warm_start: the start of evolution: 'greedy', whose evaluations then count as its own, 'uniform', or the
            file of a profile, whose proportions it takes; None is greedy, and uniform in mode 'paper'.
        expand: other token budgets, to which the chosen candidate is scaled without another search, and tested there.
        batch: candidates evaluated at a time.
        actors: Ray actors that evaluate, each a share of the candidates (extra `ray`); 0 evaluates in this process.
        runs: folder of checkpoints; None keeps none.
        output: the profile's file; None writes none.
    """

    model: Path
    tasks: tuple[str, ...]
    token_budget: int
    length: int = 1024
    search: SpaceName = "tokens"
    allocator: AllocatorName = "greedy"
    mode: Mode = "project"
    cache_score: Literal["candidate", "group"] = "candidate"
    evaluations: int = 400
    group_layers: int = 8
    measure: Measure = "exact"
    query_aware: bool = False
    samples: int = 32
    selection: int = 64
    test: int = 128
    compare: tuple[Compared, ...] = ()
    window: int = 8
    kernel: int = 7
    sinks: int = 4
    headroom: int = 128
    seed: int = 0
    warm_start: str | None = None
    expand: tuple[int, ...] = ()
    batch: int = 10
    actors: int = 0
    runs: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks is empty: name one at least, `python -m kvjax.eval --list` has them")
        for name in ("length", "evaluations", "group_layers", "samples", "selection", "test", "headroom", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        named = {self.allocator, *self.compare}
        shares_tokens = SPACES[self.search].shares_tokens
        if not shares_tokens and (self.mode == "paper" or named - {"evolution", "random"} or self.expand):
            raise ValueError(
                "RocketKV's numbers are no tokens to share: search them by evolution in mode 'project' or by random, "
                "compare nothing else, and expand to nothing"
            )
        if self.mode == "paper" and self.allocator != "evolution":
            raise ValueError(f"mode=paper is evolution's, and allocator={self.allocator}: set allocator=evolution")
        if STREAMING in self.compare and (self.actors or self.search != "tokens"):
            raise ValueError("compare: streaming is evaluated in this process, with a number a layer: leave it out")
        if self.actors < 0 or (self.actors and not shares_tokens):
            raise ValueError(
                f"actors={self.actors}: give 0 or more, and 0 where search={self.search}, which is evaluated here"
            )
        floor = self.eviction.floor
        if self.token_budget < floor:
            raise ValueError(
                f"token_budget={self.token_budget} is less than the {floor} tokens that every layer keeps, "
                f"window={self.window} and sinks={self.sinks}: raise it, or lower those"
            )
        if self.token_budget in self.expand:
            raise ValueError(f"expand={self.expand} names the token budget that is searched: leave it out")
        if self.token_budget > self.length:
            raise ValueError(f"token_budget={self.token_budget} exceeds length={self.length}: nothing is compressed")

    @property
    def begins_with(self) -> str:
        """The start of evolution: 'greedy', 'uniform', or the file of a profile."""
        if not SPACES[self.search].shares_tokens:
            return "uniform"
        return self.warm_start or ("uniform" if self.mode == "paper" else "greedy")

    @property
    def eviction(self) -> EvictionSettings:
        """The settings of stage 1."""
        return EvictionSettings(self.window, self.kernel, self.sinks, self.headroom)

    def space(self, *, layers: int, kv_heads: int, longest: int) -> SearchSpace:
        """The space that is searched, for a model and the longest prompt of its samples."""
        return SPACES[self.search].of(
            layers=layers,
            kv_heads=kv_heads,
            longest=longest,
            mean=self.token_budget,
            group_layers=self.group_layers,
            eviction=self.eviction,
        )


def read_config(path: Path) -> SearchConfig:
    """The search that a YAML file describes.

    Raises:
        TypeError: the file names a field that does not exist.
        ValueError: a value out of its bounds.
    """
    return from_fields(yaml.safe_load(path.read_text()))


def from_fields(fields: dict[str, Any]) -> SearchConfig:
    """A config of plain values, as YAML and JSON have them; names that files of earlier versions use are read too."""
    fields = {_RENAMED.get(name, name): value for name, value in fields.items()}
    if fields.get("cache_score") == "scheme":
        fields["cache_score"] = "candidate"
    for name in ("model", "runs", "output"):
        if fields.get(name) is not None:
            fields[name] = Path(fields[name])
    for name in ("tasks", "compare", "expand"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return SearchConfig(**fields)
