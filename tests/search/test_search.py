"""The search as a whole, on the hand-set transformer, of which the best budgets are known."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.budget import BudgetProfile
from kvjax.engine.compiles import CompileCounter
from kvjax.search.config import SearchConfig
from kvjax.search.evaluation import Evaluator
from kvjax.search.result import FULL, SearchResult
from kvjax.search.run import Search, search
from tests.search.copying import MODEL, WINDOW, sets

CONFIG = SearchConfig(
    model=Path("hand-set"), tasks=("copying",), token_budget=40, length=96, evaluations=120, window=WINDOW, sinks=0
)


@pytest.fixture(scope="module")
def model():
    return MODEL.build()


@pytest.fixture(scope="module")
def found(model) -> SearchResult:
    config = dataclasses.replace(CONFIG, warm_start="uniform", compare=("greedy", "random"), expand=(20,))
    return search(config, model=model, sets=sets(), progress=False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("warm_start", ["greedy", "uniform"])
def test_the_known_best_budgets_are_found(model, seed, warm_start):
    config = dataclasses.replace(CONFIG, seed=seed, warm_start=warm_start)
    result = search(config, model=model, sets=sets(24), progress=False)
    assert result.chosen.scheme is not None
    assert sum(result.chosen.scheme) == 80
    assert result.chosen.scheme[0] <= WINDOW + 2


def test_what_is_reported(found):
    by_name = {outcome.name: outcome for outcome in found.outcomes}
    assert {FULL, "evolution", "uniform", "pyramid", "inverse-pyramid", "entropy", "greedy", "random"} == set(by_name)
    assert by_name[FULL].test.mean == 1
    assert found.chosen.name == "evolution"
    assert found.chosen.test.mean > by_name["uniform"].test.mean
    mean, low, high = found.chosen.gain
    assert low <= mean <= high
    assert mean == pytest.approx(found.chosen.test.mean - by_name["uniform"].test.mean)
    assert found.chosen.calibration_gap == pytest.approx(found.chosen.search.mean - found.chosen.test.mean)
    assert by_name["evolution"].evaluations == by_name["random"].evaluations == CONFIG.evaluations
    assert sum(found.expanded[20]) == 40
    assert found.expanded[20][0] <= WINDOW + 1


def test_anchors_cost_the_same(found):
    for outcome in found.outcomes:
        assert outcome.scheme is None or sum(outcome.scheme) == 80


def test_never_worse_than_uniform_on_the_selection_set(model):
    """One generation finds nothing: then uniform is what is chosen, or something better."""
    for seed in range(3):
        config = dataclasses.replace(CONFIG, seed=seed, evaluations=1, warm_start="uniform")
        result = search(config, model=model, sets=sets(16), progress=False)
        even = next(outcome for outcome in result.outcomes if outcome.name == "uniform")
        assert result.chosen.selection.mean >= even.selection.mean


def test_the_result_survives_as_json(found, tmp_path):
    assert SearchResult.from_json(found.to_json()).to_json() == found.to_json()
    found.save(tmp_path / "profile.json")
    again = SearchResult.from_json((tmp_path / "profile.search.json").read_text())
    assert again.profile == found.profile
    assert BudgetProfile.load(tmp_path / "profile.json", found.model) == found.profile
    provenance = json.loads((tmp_path / "profile.json").read_text())["provenance"]
    assert provenance["tokens_kept_of_a_prompt"] == list(found.chosen.scheme)
    assert provenance["mean"] == CONFIG.token_budget


def test_one_compile_for_a_whole_search(model):
    """Budgets, population sizes, sets: nothing of it is a shape."""
    its = Search(dataclasses.replace(CONFIG, evaluations=30), model=model, sets=sets(24))
    list(itertools.islice(its, 1))
    for name in ("selection", "test"):
        its.bench.scores(name, its.space.uniform)
    counter = CompileCounter()
    counter.start()
    try:
        its.bench.judge("search", np.array([[4, 76], [10, 70], [40, 40]]))
        its.bench.judge("test", np.full((23, 2), 40))
        assert counter.count == 0
    finally:
        counter.stop()


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("allocator", ["evolution", "random", "greedy"])
def test_a_search_that_was_stopped_ends_as_one_that_was_not(model, tmp_path, allocator, stop):
    config = dataclasses.replace(CONFIG, allocator=allocator, evaluations=60, warm_start="uniform")
    whole = Search(config, model=model, sets=sets(16))
    list(whole)
    stopped = Search(dataclasses.replace(config, runs=tmp_path), model=model, sets=sets(16))
    generations = iter(stopped)
    for _ in itertools.islice(generations, stop):
        pass
    generations.close()
    resumed = Search(dataclasses.replace(config, runs=tmp_path), model=model, sets=sets(16))
    list(resumed)
    assert len(resumed.run.history) == len(whole.run.history)
    for ours, theirs in zip(resumed.run.history, whole.run.history, strict=True):
        np.testing.assert_array_equal(ours.schemes, theirs.schemes)
        np.testing.assert_array_equal(ours.fitness, theirs.fitness)
    for ours, theirs in zip(jax.tree.leaves(resumed.run.state), jax.tree.leaves(whole.run.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_search_is_not_resumed(model, tmp_path):
    config = dataclasses.replace(CONFIG, evaluations=20, warm_start="uniform", runs=tmp_path)
    list(itertools.islice(Search(config, model=model, sets=sets(8)), 1))
    other = Search(dataclasses.replace(config, evaluations=30), model=model, sets=sets(8))
    with pytest.raises(ValueError, match=r"differs in evaluations: begin afresh \(--fresh\)"):
        list(other)
    fresh = Search(dataclasses.replace(config, evaluations=30), model=model, sets=sets(8), fresh=True)
    assert len(list(fresh)) > 0


def test_a_warm_start_begins_where_a_profile_ended(model, found, tmp_path):
    found.save(tmp_path / "profile.json")
    config = dataclasses.replace(CONFIG, warm_start=str(tmp_path / "profile.json"))
    its = Search(config, model=model, sets=sets(8))
    [first, *_] = its
    assert first.schemes[:, 0].mean() < 10


def test_every_scheme_is_scored_as_it_is_alone(model):
    its = Search(CONFIG, model=model, sets=sets(16))
    schemes = np.array([[4, 76], [40, 40], [76, 4], [20, 60]])
    together = its.bench.judge("search", schemes)
    for row, scheme in enumerate(schemes):
        alone = Evaluator(model, batch=1)
        blocks = alone.place(its.bench._reader.read(its.bench.sets.search, 96, 2))
        np.testing.assert_array_equal(alone(scheme[None], blocks, 16).exact[0], together.exact[row])
