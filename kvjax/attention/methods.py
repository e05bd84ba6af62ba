"""The methods by name: each a stage 1, a stage 2, or both. How many tokens either keeps is a budget's to say.

`METHODS` parametrizes tests and evaluations; a method of other parameters is a `Method` of one's own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvjax.attention.stage1 import Observation, Stage1, Streaming
from kvjax.attention.stage2 import ExactTopK, HybridPages, HybridTokens, Quest, Stage2


@dataclasses.dataclass(frozen=True)
class Method:
    """What a layer keeps of a prompt and what a decode step reads of that. None: everything."""

    stage1: Stage1 | None = None
    stage2: Stage2 | None = None

    def kept_bytes(self, capacity: int, head_dim: int, itemsize: int, group: int = 1) -> int:
        """Bytes that a slot of `capacity` entries takes for each kv head of the model (`group` query heads)."""
        views = group if self.stage1 is not None and self.stage1.per_head else 1
        if self.stage2 is None:
            return views * capacity * 2 * head_dim * itemsize
        return views * self.stage2.kept_bytes(capacity, head_dim, itemsize)

    def read_bytes(self, entries: int, head_dim: int, itemsize: int, group: int = 1) -> int:
        """Bytes that a decode step has to read for each kv head of the model, of a view with so many entries."""
        views = group if self.stage1 is not None and self.stage1.per_head else 1
        if self.stage2 is None:
            return views * entries * 2 * head_dim * itemsize
        return views * self.stage2.read_bytes(entries, head_dim, itemsize, group // views)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The integers of a budget from which a method's stage 2 is built; methods take those that they know.

    Attributes:
        tokens: entries attended exactly in a step.
        dense: a slot with at most so many entries reads them all.
        dims: head dims that `rocketkv-faithful` reads of a page; `small_page` are its entries, 1 to 3.
        page: entries of a page where whole pages are read.
    """

    tokens: int
    dense: int = 0
    dims: int = 64
    small_page: int = 1
    page: int = 16

    def hybrid_tokens(self) -> HybridTokens:
        return HybridTokens(self.tokens, self.dims, self.small_page, dense=self.dense)

    def hybrid_pages(self) -> HybridPages:
        return HybridPages(self.tokens, self.page, dense=self.dense)

    def quest(self) -> Quest:
        return Quest(self.tokens, self.page, dense=self.dense)

    def exact(self, *, shared: bool) -> ExactTopK:
        return ExactTopK(self.tokens, shared, dense=self.dense)


_ROCKET = Observation(window=32, kernel=63)

METHODS: Mapping[str, Callable[[Reading], Method]] = MappingProxyType(
    {
        "full": lambda _: Method(),
        "rocketkv": lambda reading: Method(_ROCKET, reading.hybrid_pages()),
        "rocketkv-faithful": lambda reading: Method(_ROCKET, reading.hybrid_tokens()),
        "rocketkv-stage1": lambda _: Method(_ROCKET),
        "rocketkv-stage2": lambda reading: Method(None, reading.hybrid_pages()),
        "rocketkv-stage2-faithful": lambda reading: Method(None, reading.hybrid_tokens()),
        "snapkv": lambda _: Method(Observation(window=32, kernel=7, per_head=True)),
        # the method is SnapKV's, over `pyramid_budgets`
        "pyramidkv": lambda _: Method(Observation(window=8, kernel=7, per_head=True)),
        "streaming": lambda _: Method(Streaming(sinks=4)),
        "quest": lambda reading: Method(None, reading.quest()),
        "exact": lambda reading: Method(None, reading.exact(shared=True)),
        "exact-per-head": lambda reading: Method(None, reading.exact(shared=False)),
    }
)


def method(name: str, reading: Reading) -> Method:
    """The method of that name for a budget.

    Raises:
        ValueError: for a name that is not in `METHODS`.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not known: one of {', '.join(METHODS)}")
    return METHODS[name](reading)


def pyramid_budgets(layers: int, mean: int, window: int = 8, beta: int = 20) -> tuple[int, ...]:
    """PyramidKV's tokens a layer (arXiv 2406.02069): an arithmetic sequence, most in the first layer.

    Beyond the window the last layer keeps `1 / beta` of the mean, the first what the mean leaves; whole tokens are
    handed out so that the sum is `layers * mean` exactly.

    Raises:
        ValueError: where the mean does not exceed the window.
    """
    if mean <= window:
        raise ValueError(f"mean={mean} is not above window={window}: every layer keeps its window and some more")
    share = mean - window
    last = share / beta
    step = 2 * (share - last) / max(layers - 1, 1)
    exact = [share] if layers == 1 else [last + step * (layers - 1 - layer) for layer in range(layers)]
    budgets = [window + math.floor(x) for x in exact]
    left = layers * mean - sum(budgets)
    by_remainder = sorted(range(layers), key=lambda layer: (math.floor(exact[layer]) - exact[layer], layer))
    for layer in by_remainder[:left]:
        budgets[layer] += 1
    return tuple(budgets)
