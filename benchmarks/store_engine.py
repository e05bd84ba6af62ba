"""What the parts of `benchmarks.store` have in common: their sizes, and an engine that is asked one thing at a time."""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.engine.kv.prefix_cache import PrefixCache
from kvjax.store.config import StoreConfig
from kvjax.store.store import KVStore

ONE = SamplingParams(max_tokens=1, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much the parts do.

    Attributes:
        model: a folder with random weights.
        served: folder or file of the model that `again` and `together` ask; token ids are below `vocabulary`.
        lengths: of prompts, in tokens; `prompts` are those of `again`. `rounds`: repetitions, the median of which
            counts.
        ratios: how much faster than computing a tier is.
        host: bytes of host memory. `object`: bytes of an object on the disk, of which `objects` are read.
        documents: so many are asked about. `blocks`: so many are in the folder that is opened.
    """

    model: str
    lengths: tuple[int, ...]
    rounds: int
    served: str = ""
    vocabulary: int = 30_000
    prompts: tuple[int, ...] = (2_000, 6_000, 16_000)
    ratios: tuple[float, ...] = (0.5, 1, 2, 5, 10, 50)
    host: int = 3 << 30
    object: int = 16 << 20
    objects: int = 32
    documents: int = 6
    blocks: int = 10_000

    def toy(self) -> "Plan":
        """The same in seconds."""
        return dataclasses.replace(
            self,
            prompts=self.lengths,
            ratios=(1, 10),
            host=64 << 20,
            object=1 << 20,
            objects=8,
            documents=2,
            blocks=200,
        )


@contextlib.contextmanager
def engine_on(model: str, context: int, store: StoreConfig | None, slots: int = 1) -> Iterator[Engine]:
    config = EngineConfig(max_model_len=context, max_num_seqs=slots, store=store)
    with Engine.from_pretrained(model, config) as engine:
        yield engine


def prompt(length: int, seed: int, vocabulary: int = 30_000) -> list[int]:
    return np.random.default_rng(seed).integers(10, vocabulary, length).tolist()


def ttft(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were not computed. What is new is stored after."""
    began = time.perf_counter()
    [answer] = engine.generate([tokens], ONE, progress=False)
    seconds = time.perf_counter() - began
    settle(engine)
    return seconds, answer.cached_tokens


def settle(engine: Engine) -> None:
    """Waits until everything that was computed is stored, in every tier."""
    if engine._prefix is not None:
        engine._prefix.executor.settle(60.0)
        engine._prefix.store.wait(600.0)


def prefix_of(engine: Engine) -> PrefixCache:
    assert engine._prefix is not None
    return engine._prefix


def store_of(engine: Engine) -> KVStore:
    return prefix_of(engine).store


def step_of(engine: Engine) -> int:
    """Tokens that a hit is a multiple of: the smallest unit whose rows have the bits of the largest on this device."""
    assert engine._runner is not None
    return engine._runner.sizes[0]


def forget_host(engine: Engine) -> None:
    """Only the tiers below hold anything now. A store never does this by itself, hence the private names."""
    store = store_of(engine)
    with store._mutex:
        for buffer in store._host.ready():
            store._host._drop(buffer)


def in_turns(arms: dict[str, Callable[[], None]], rounds: int, size: int) -> dict[str, float]:
    """Gigabytes a second of each, the median of `rounds` after one that warms up."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            rates[name].append(size / (time.perf_counter() - began) / 1e9)
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def in_pairs(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the ratios of what was measured in turns: a machine that slows down does so for both."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def more(these: Sequence[float], those: Sequence[float]) -> tuple[float, float]:
    """By which share what was measured in turns is more, on average, and the standard error of that."""
    shares = [a / b - 1 for a, b in zip(these, those, strict=True)]
    return statistics.fmean(shares), statistics.stdev(shares) / math.sqrt(len(shares))


def cpu_of_store() -> float:
    """Seconds of CPU that the threads of this process have taken that save and write blocks."""
    threads = (thread for thread in threading.enumerate() if thread.name.startswith(("kvjax-save", "kvjax-write")))
    took = (pathlib.Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text() for thread in threads)
    return sum(int(each.split()[0]) for each in took) / 1e9
