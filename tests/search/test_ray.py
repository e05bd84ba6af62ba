"""Candidates evaluated in Ray actors: the same bits as here, also when an actor dies. Nightly: Ray starts slowly."""

import dataclasses
import gc
import importlib.util
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from benchmarks.model_card.induction import Induction, write
from kvjax import models
from kvjax.attention.eviction import Observation
from kvjax.search.config import SearchConfig
from kvjax.search.evaluators.evaluator import BLOCK
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedPrompts, RankedReader
from kvjax.search.evaluators.ray_actors import RayEvaluator
from kvjax.search.evaluators.scores import Scores
from kvjax.search.run import search
from kvjax.search.samples import RankedCase, SampleSets

WORDS, LENGTH, SAMPLES = 64, 100, 11  # the last block of samples is filled up

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray: the extra `ray` is not installed"),
]


def cases(seed: int) -> list[RankedCase]:
    """A token that was once in the prompt: after it comes what followed it there."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(SAMPLES):
        words = rng.permutation(WORDS)
        prompt = [*words, *rng.choice(words[WORDS // 2 :], LENGTH - WORDS)]
        at = rng.integers(WORDS // 2 - 1)
        found.append(
            RankedCase(tuple(int(word) for word in prompt), tuple(int(word) for word in words[at : at + 2]), 1)
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write(Induction(WORDS, 128), path)
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> PopulationEvaluator:
    return PopulationEvaluator(models.load(folder), batch=3)


@pytest.fixture(scope="module")
def readings(folder: Path) -> list[RankedPrompts]:
    reader = RankedReader(models.load(folder), Observation(4, 1, 2), LENGTH)
    return [reader.read(cases(seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small cluster of this machine, whose processes are gone in the end."""
    import ray

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # it forks to exec
        ray.init(
            "local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False,
            configure_logging=False,
        )  # fmt: skip
    processes = psutil.Process().children(recursive=True)
    yield
    processes += psutil.Process().children(recursive=True)
    ray.shutdown()
    assert not psutil.wait_procs(processes, timeout=60)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray ends its processes and does not wait for them
        gc.collect()


@pytest.fixture(scope="module")
def far(folder: Path, cluster: None) -> Iterator[RayEvaluator]:
    with RayEvaluator(folder, actors=2, batch=3) as evaluator:
        yield evaluator


def candidates(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(8, LENGTH, (count, 2))


def same(found: Scores, expected: Scores) -> None:
    for name in ("exact", "tokens", "log_probability"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def pids(evaluator: RayEvaluator) -> list[int]:
    """Processes of the actors."""
    import ray

    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in evaluator._actors])


@pytest.mark.parametrize("count", [1, 2, 5, 6, 13])
def test_scores_are_those_of_the_local_evaluator_to_the_bit(far, local, readings, count):
    assert far.layers == local.layers == [0, 1]
    for read in readings:
        before = far.evaluations
        expected = local.evaluate(candidates(count), local.place(read), SAMPLES)
        same(far.evaluate(candidates(count), far.place(read), SAMPLES), expected)
        assert far.evaluations == before + count
        assert 0 < expected.exact.mean() < 1 or count < 5  # they are no constants


def test_random_weights_round_alike(cluster, far, readings, tmp_path):
    """What the transformer set by hand says is too clear to show in which order numbers were added."""
    config = Induction(WORDS, 128).config
    models.save(models.random(config, jax.random.key(0)), tmp_path)
    model = models.load(tmp_path)
    read, local = RankedReader(model, Observation(4, 3, 2), LENGTH).read(cases(0)), PopulationEvaluator(model, batch=3)
    with RayEvaluator(tmp_path, actors=2, batch=3, options={"num_cpus": 0}) as other:
        found = other.evaluate(candidates(7), other.place(read), SAMPLES)
    same(found, local.evaluate(candidates(7), local.place(read), SAMPLES))
    assert len(np.unique(found.log_probability)) == 7 * SAMPLES


def test_each_kv_head_may_have_a_budget(far, local, readings):
    budgets = np.random.default_rng(2).integers(8, LENGTH, (5, 2, 2))
    same(
        far.evaluate(budgets, far.place(readings[0]), SAMPLES),
        local.evaluate(budgets, local.place(readings[0]), SAMPLES),
    )


def test_a_set_may_be_placed_in_parts(folder, far, local):
    """As the search does: a block at a time."""
    reader, drawn = RankedReader(models.load(folder), Observation(4, 1, 2), LENGTH), cases(0)
    parts = [reader.read(drawn[:BLOCK], LENGTH, 2), reader.read(drawn[BLOCK:], LENGTH, 2)]
    here, there = ([block for part in parts for block in each.place(part)] for each in (local, far))
    same(far.evaluate(candidates(4), there, SAMPLES), local.evaluate(candidates(4), here, SAMPLES))
    entropy = np.concatenate([block.entropy for block in there])
    np.testing.assert_array_equal(entropy, np.concatenate([block.entropy for block in here])[:SAMPLES])


def test_an_actor_killed_between_two_calls_is_replaced(far, local, readings):
    placed, expected = far.place(readings[0]), local.evaluate(candidates(6), local.place(readings[0]), SAMPLES)
    same(far.evaluate(candidates(6), placed, SAMPLES), expected)
    before = pids(far)
    os.kill(before[1], signal.SIGKILL)
    same(far.evaluate(candidates(6), placed, SAMPLES), expected)
    after = pids(far)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_an_actor_killed_while_it_judges_is_replaced(far, local, readings, monkeypatch):
    placed, expected = far.place(readings[1]), local.evaluate(candidates(40), local.place(readings[1]), SAMPLES)
    before = pids(far)
    get, killed = far._ray.get, []

    def kill_first(references, **settings):
        if not killed:  # its share has been handed out, and is not done
            killed.append(before[0])
            os.kill(before[0], signal.SIGKILL)
        return get(references, **settings)

    os.kill(before[0], signal.SIGSTOP)  # so that it is surely at work when it is killed
    monkeypatch.setattr(far._ray, "get", kill_first)
    same(far.evaluate(candidates(40), placed, SAMPLES), expected)
    monkeypatch.undo()
    assert killed
    assert pids(far)[0] != before[0]


def test_the_second_death_of_a_share_is_an_error_that_says_what_to_do(far, local, readings, monkeypatch):
    placed, loaded = far.place(readings[0]), far._loaded

    def loaded_and_dead(actors):
        found = loaded(actors)
        os.kill(far._ray.get(actors[0].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        return found

    os.kill(pids(far)[0], signal.SIGKILL)
    monkeypatch.setattr(far, "_loaded", loaded_and_dead)
    with pytest.raises(RuntimeError, match=r"so did the one that took its place.*fewer at a time than batch=3"):
        far.evaluate(candidates(6), placed, SAMPLES)
    monkeypatch.undo()
    same(
        far.evaluate(candidates(6), placed, SAMPLES), local.evaluate(candidates(6), local.place(readings[0]), SAMPLES)
    )  # and it goes on


def test_actors_drop_what_the_caller_has_dropped(far, readings):
    import ray

    def held() -> list[list[int]]:
        return ray.get([actor.__ray_call__.remote(lambda worker: sorted(worker._placed)) for actor in far._actors])

    first, second = far.place(readings[0]), far.place(readings[1])
    far.evaluate(candidates(2), first, SAMPLES)
    far.evaluate(candidates(2), second, SAMPLES)
    assert all({first[0].key, second[0].key} <= set(keys) for keys in held())
    gone = first[0].key
    del first
    far.evaluate(candidates(2), second, SAMPLES)
    assert not any(gone in keys for keys in held())


def test_a_search_with_actors_finds_what_one_without_finds(cluster, folder):
    sets = SampleSets(tuple(cases(0)), tuple(cases(1)), tuple(cases(2)))
    config = SearchConfig(
        model=folder, tasks=("copying",), token_budget=40, length=LENGTH, window=4, sinks=2, evaluations=40, batch=4
    )
    alone = search(config, sets=sets, progress=False)
    shared = search(dataclasses.replace(config, actors=2), sets=sets, progress=False)
    assert shared.chosen.candidate == alone.chosen.candidate
    assert [outcome.test for outcome in shared.outcomes] == [outcome.test for outcome in alone.outcomes]


def test_actors_read_the_model_themselves(folder):
    config = SearchConfig(model=folder, tasks=("copying",), token_budget=40, length=LENGTH, actors=2)
    with pytest.raises(ValueError, match=r"actors=2 load the model from .*: pass no model"):
        search(config, model=models.load(folder), sets=SampleSets(*[tuple(cases(seed)) for seed in range(3)]))


def test_schemes_of_another_model_are_refused(far, readings):
    with pytest.raises(ValueError, match="for 2 layers"):
        far.evaluate(np.zeros((3, 5), np.int64), far.place(readings[0]), SAMPLES)


def test_a_folder_that_is_not_there_is_named(cluster, far, tmp_path):
    with pytest.raises(RuntimeError, match=r"could not load .*nothing.*every machine of the cluster"):
        RayEvaluator(tmp_path / "nothing", actors=1, options={"num_cpus": 0})


def test_too_many_actors_end_in_an_error_and_not_in_silence(cluster, far, folder):
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"num_cpus.*the cluster has.*ask for fewer or smaller"):
        RayEvaluator(folder, actors=1, options={"num_cpus": 64}, patience=1)
    assert time.monotonic() - began < 30


def test_a_closed_evaluator_says_so(cluster, folder, readings):
    evaluator = RayEvaluator(folder, actors=1, options={"num_cpus": 0})
    placed = evaluator.place(readings[0])
    evaluator.close()
    with pytest.raises(RuntimeError, match="was closed"):
        evaluator.evaluate(candidates(1), placed, SAMPLES)


@pytest.mark.parametrize("fields", [{"actors": 0}, {"batch": 0}])
def test_settings_out_of_bounds_are_refused(fields):
    with pytest.raises(ValueError, match="must be at least 1"):
        RayEvaluator("anywhere", **fields)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="extra `ray`, or evaluate with PopulationEvaluator"):
        RayEvaluator("anywhere")
