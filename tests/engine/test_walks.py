"""The walks of `docs/architecture.md`: each names functions, and a real run calls them in that order."""

import functools
import importlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.engine import Engine, EngineConfig
from kvjax.store.config import StoreConfig
from tests.engine import tiny
from tests.engine.client import GREEDY, Client, settle

DOCUMENT = Path(__file__).parents[2] / "docs" / "architecture.md"
LONGEST = 10  # functions: what a newcomer reads in one go
STEP = re.compile(r"^\d+\. `([\w.]+)`")


def walks() -> dict[str, list[str]]:
    """Names of the functions, without `kvjax.`, of each walk by its title."""
    section = DOCUMENT.read_text().split("\n## Walks\n")[1].split("\n## ")[0]
    parts = [part.split("\n", 1) for part in section.split("\n### ")[1:]]
    return {title: [step[1] for line in text.splitlines() if (step := STEP.match(line))] for title, text in parts}


def find(name: str) -> tuple[Any, str]:
    """What holds a function, a module or a class, and its name there."""
    *path, last = f"kvjax.{name}".split(".")
    for depth in range(len(path), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(path[:depth]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, path[depth:], owner), last
    raise AssertionError(f"{name}: no such module")


class Calls:
    """The calls of functions, in the order in which they begin, in any thread."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._lock = threading.Lock()

    def record(self, patch: pytest.MonkeyPatch, name: str) -> None:
        owner, last = find(name)
        raw = vars(owner)[last]
        if isinstance(raw, classmethod | staticmethod):
            patch.setattr(owner, last, type(raw)(self._recording(name, raw.__func__)))
        else:
            patch.setattr(owner, last, self._recording(name, raw))

    def _recording(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.names.append(name)
            return function(*args, **kwargs)

        return call

    def check_order(self, names: list[str]) -> None:
        """Raises AssertionError unless each was called after the one before it."""
        position = 0
        for before, name in zip(["the beginning", *names], names, strict=False):
            assert name in self.names[position:], f"{name} is not called after {before}"
            position = self.names.index(name, position) + 1


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> Calls:
    """Those of an engine with a budget profile that stores a prompt on the disk, and of one that finds it there."""
    folder, disk = tiny.write(tmp_path_factory.mktemp("walk")), tmp_path_factory.mktemp("disk")
    profile, prompt, calls = folder / "profile.json", tiny.prompt(600, seed=3), Calls()
    store = StoreConfig(
        host_cache_size=1 << 22, disk_cache=disk, disk_cache_size=1 << 30, prefetch_policy="wait_complete"
    )
    config = EngineConfig(
        max_model_len=900, max_num_seqs=2, prefill_chunk_size=256, budgets=str(profile), headroom=32, store=store
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in {name for names in walks().values() for name in names}:
            calls.record(patch, name)
        budget = LayerBudget.selecting(160, observation_window=32)
        windows = [layer.window for layer in tiny.CONFIG.layers]
        BudgetProfile.uniform(windows, 900, budget).save(profile, ModelFingerprint.of(tiny.CONFIG))
        for cached in (0, 512):
            with Engine.from_pretrained(folder, config) as engine, Client() as client:
                assert client.submit(engine, prompt, GREEDY).result().cached_tokens == cached
                settle(engine)
                engine.drain(20.0)
    return calls


def test_there_are_three_walks():
    assert list(walks()) == ["A prompt's tokens", "A block's bytes", "A budget profile"]


@pytest.mark.parametrize("title", walks())
def test_a_walk_is_short_and_what_it_names_is_called_in_that_order(calls, title):
    names = walks()[title]
    assert 5 <= len(names) == len(set(names)) <= LONGEST
    calls.check_order(names)


def test_another_order_fails():
    calls = Calls()
    calls.names = ["a", "b", "a", "c"]
    calls.check_order(["b", "a", "c"])
    for wrong in (["c", "a"], ["b", "b"], ["d"]):
        with pytest.raises(AssertionError, match="is not called after"):
            calls.check_order(wrong)
