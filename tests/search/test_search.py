"""The search as a whole, on the hand-set transformer, of which the best budgets are known."""

import dataclasses
import itertools
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.attention.eviction import Observation, Streaming
from kvjax.budget import BudgetProfile
from kvjax.engine.device.compiles import CompileCounter
from kvjax.search import run
from kvjax.search.config import SearchConfig
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedReader, streaming_order
from kvjax.search.outcome import FULL
from kvjax.search.result import SearchResult
from kvjax.search.run import Search, search
from tests.search.copying import MODEL, WINDOW, case, sets

CONFIG = SearchConfig(
    model=Path("hand-set"),
    tasks=("copying",),
    token_budget=40,
    length=96,
    allocator="evolution",
    evaluations=120,
    window=WINDOW,
    sinks=0,
)
EVERY = np.array([(first, 80 - first) for first in range(WINDOW, 77)])  # all candidates of that cost


@pytest.fixture(scope="module")
def model():
    return MODEL.build()


@pytest.fixture(scope="module")
def found(model) -> SearchResult:
    config = dataclasses.replace(
        CONFIG, warm_start="uniform", compare=("greedy", "fine-greedy", "random", "streaming"), expand=(20, 48)
    )
    return search(config, model=model, sets=sets(), progress=False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("warm_start", ["greedy", "uniform"])
def test_the_known_best_budgets_are_found(model, seed, warm_start):
    """Every candidate of that cost is evaluated to know the best: the floor for layer 0, the rest for layer 1."""
    config = dataclasses.replace(CONFIG, seed=seed, warm_start=warm_start)
    began = time.process_time()
    with Search(config, model=model, sets=sets(24)) as its:
        result = its.result()
        assert time.process_time() - began < 30  # of CPU, whatever else this machine does
        every = its.context.evaluate("test", EVERY).exact.mean(axis=1)
    assert np.argmax(every) == 0
    found = result.outcome("evolution")
    assert found.candidate is not None
    assert sum(found.candidate) == 80
    assert found.candidate[0] <= WINDOW + 2
    assert found.test.mean >= every[2] > result.outcome("uniform").test.mean


def test_what_is_reported(found):
    by_name = {outcome.name: outcome for outcome in found.outcomes}
    rules = {"uniform", "pyramid", "inverse-pyramid", "entropy"}
    assert {FULL, *rules, "evolution", "greedy", "fine-greedy", "random", "streaming"} == set(by_name)
    assert by_name[FULL].test.mean == 1
    assert found.chosen.test.mean > by_name["uniform"].test.mean
    assert found.outcome("greedy") == by_name["greedy"]
    with pytest.raises(KeyError, match="pyramidal was not compared"):
        found.outcome("pyramidal")
    mean, low, high = found.chosen.gain
    assert low <= mean <= high
    assert mean == pytest.approx(found.chosen.test.mean - by_name["uniform"].test.mean)
    assert found.chosen.calibration_gap == pytest.approx(found.chosen.search.mean - found.chosen.test.mean)
    assert by_name["evolution"].evaluations == by_name["random"].evaluations == CONFIG.evaluations
    assert by_name["greedy"].evaluations == 2 * 6 + 1
    assert CONFIG.evaluations // 2 < by_name["fine-greedy"].evaluations <= CONFIG.evaluations  # sizes that round alike
    assert {by_name[rule].evaluations for rule in rules} == {0}
    assert by_name["streaming"].candidate == by_name["uniform"].candidate
    assert found.made_by == found.provenance["made_by"] == "kvjax.search.run.search"


def test_the_last_tokens_answer_what_is_asked_of_them(found):
    """Streaming keeps the last 40 tokens, 20 of 48 pairs, and answers what is asked of those, the rest by chance."""
    places = np.array([case.prompt[::2].index(case.tail[0]) for case in sets().test])
    said = np.array(found.outcome("streaming").each)
    assert said[places >= 28].min() == 1
    assert said[places < 28].mean() < 0.1


@pytest.mark.parametrize("retained", [4, 7, 40, 96])
def test_what_was_read_is_put_in_the_order_of_streaming(model, retained):
    """As if it had been read with StreamingLLM's stage 1: the first entries are the same, in whatever order."""
    cases = sets(2).search
    read = RankedReader(model, Observation(WINDOW, 7, 2), 96).read([*cases, case(9, pairs=40)])
    expected = RankedReader(model, Streaming(1, 2), 96).read([*cases, case(9, pairs=40)])
    for ours, theirs in zip(streaming_order(read, 2).layers, expected.layers, strict=True):
        places = [np.sort(np.asarray(held.order)[..., :retained], axis=-1) for held in (ours, theirs)]
        np.testing.assert_array_equal(*places)
        by_place = [
            np.take_along_axis(np.asarray(h.k), np.argsort(h.order, axis=-1)[..., None], 2) for h in (ours, theirs)
        ]
        np.testing.assert_array_equal(*by_place)


def test_what_is_best_on_the_selection_set_is_chosen_and_of_equals_the_cheaper(found):
    candidates = [each for each in found.outcomes if each.candidate is not None and each.name != "streaming"]
    best = max((each.selection.mean, each.selection.log_probability) for each in candidates)
    assert (found.chosen.selection.mean, found.chosen.selection.log_probability) == best
    equals = [each.evaluations for each in candidates if each.candidate == found.chosen.candidate]
    assert found.chosen.evaluations == min(equals)


def test_two_outcomes_are_paired_by_sample(found):
    chosen, even = found.chosen, found.outcome("uniform")
    assert len(chosen.each) == len(even.each) == chosen.test.samples
    assert np.mean(chosen.each) == pytest.approx(chosen.test.mean)
    assert chosen.over(even) == chosen.gain
    assert chosen.over(chosen)[0] == 0
    mean, low, high = even.over(chosen)
    assert (mean, low, high) == pytest.approx([-value for value in (chosen.gain[0], chosen.gain[2], chosen.gain[1])])
    with pytest.raises(ValueError, match="score the same samples"):
        chosen.over(dataclasses.replace(even, each=even.each[1:]))


def test_one_search_is_tested_at_other_budgets_too(model, found):
    """The proportions hold, each candidate costs its total, and it is scored by what it keeps."""
    budgets = [result.config.token_budget for result in found.sweep]
    assert budgets == [20, 40, 48]
    its = Search(CONFIG, model=model, sets=sets())
    for result in found.sweep:
        mean = result.config.token_budget
        assert sum(result.chosen.candidate or ()) == 2 * mean
        assert (result.chosen.candidate or ())[0] <= WINDOW + 3
        assert result.uniform == (mean, mean)
        assert result.chosen.test.mean >= result.outcome("uniform").test.mean
        [[scores, _]] = its.context.scores("test", [result.chosen.candidate])
        assert scores.mean() == result.chosen.test.mean
    assert [result.chosen.test.mean for result in found.sweep] == sorted(r.chosen.test.mean for r in found.sweep)


def test_anchors_cost_the_same(found):
    for outcome in found.outcomes:
        assert outcome.candidate is None or sum(outcome.candidate) == 80


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
    half, *_ = found.sweep
    assert BudgetProfile.load(tmp_path / "profile-20.json", found.model) == half.profile
    capacities = [[budget.capacity for budget in each.profile.layers] for each in (half, found)]
    assert capacities == [
        [retained + CONFIG.headroom for retained in each.chosen.candidate or ()] for each in (half, found)
    ]
    provenance = json.loads((tmp_path / "profile.json").read_text())["provenance"]
    assert provenance["tokens_retained_of_a_prompt"] == list(found.chosen.candidate)
    assert provenance["mean"] == CONFIG.token_budget


def test_one_compile_for_a_whole_search(model):
    """Budgets, population sizes, sets: nothing of it is a shape."""
    its = Search(dataclasses.replace(CONFIG, evaluations=30), model=model, sets=sets(24))
    list(itertools.islice(its, 1))
    for name in ("selection", "test"):
        its.context.scores(name, [its.space.uniform])
    counter = CompileCounter()
    counter.start()
    try:
        its.context.evaluate("search", np.array([[4, 76], [10, 70], [40, 40]]))
        its.context.evaluate("test", np.full((23, 2), 40))
        assert counter.count == 0
    finally:
        counter.stop()


@pytest.mark.parametrize("allocator", ["evolution", "random", "greedy"])
def test_a_search_killed_at_any_generation_ends_as_one_that_was_not(model, tmp_path, monkeypatch, allocator):
    """What a killed process leaves is what was saved last: the folder is copied after each generation."""
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
    config = dataclasses.replace(CONFIG, allocator=allocator, evaluations=60, warm_start="uniform")
    whole = Search(dataclasses.replace(config, runs=tmp_path / "whole"), model=model, sets=sets(16))
    left = []
    for generation, _ in enumerate(whole):
        left.append(tmp_path / str(generation))
        shutil.copytree(tmp_path / "whole", left[-1])
    assert len(left) == len(whole.run.history) == {"evolution": 10, "random": 6, "greedy": 2}[allocator]
    for number, folder in enumerate(left, 1):
        resumed = Search(dataclasses.replace(config, runs=folder), model=model, sets=sets(16))
        evaluated = len(list(resumed))
        assert evaluated == len(left) - number  # nothing twice
        for ours, theirs in zip(resumed.run.history, whole.run.history, strict=True):
            np.testing.assert_array_equal(ours.candidates, theirs.candidates)
            np.testing.assert_array_equal(ours.fitness, theirs.fitness)
        for ours, theirs in zip(jax.tree.leaves(resumed.run.state), jax.tree.leaves(whole.run.state), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_result_goes_on_as_if_it_had_been_given_more_at_once(model):
    config = dataclasses.replace(CONFIG, evaluations=60)
    given = {"model": model, "sets": sets(16), "progress": False}
    whole = search(config, **given)
    part = SearchResult.from_json(search(dataclasses.replace(config, evaluations=40), **given).to_json())
    resumed = search(config, resume_from=part, **given)
    assert 0 < len(part.history) < len(resumed.history)
    timeless = [[dataclasses.replace(each, seconds=0.0) for each in result.outcomes] for result in (whole, resumed)]
    assert timeless[0] == timeless[1]
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        np.testing.assert_array_equal(ours.candidates, theirs.candidates)
        np.testing.assert_array_equal(ours.fitness, theirs.fitness)
    with pytest.raises(ValueError, match="no fewer evaluations"):
        search(dataclasses.replace(config, evaluations=30), resume_from=resumed, **given)
    with pytest.raises(ValueError, match="another search"):
        search(dataclasses.replace(config, seed=5), resume_from=part, **given)


def test_a_resumed_result_leaves_the_folder_of_runs_alone(model, tmp_path):
    """Its checkpoint ends at the former number of evaluations, and is of another search."""
    config = dataclasses.replace(CONFIG, evaluations=20, warm_start="uniform", runs=tmp_path)
    part = search(config, model=model, sets=sets(8), progress=False)
    saved = sorted(path.name for path in (tmp_path / "evolution").iterdir())
    more = dataclasses.replace(config, evaluations=40)
    assert len(search(more, model=model, sets=sets(8), resume_from=part, progress=False).history) > len(part.history)
    assert sorted(path.name for path in (tmp_path / "evolution").iterdir()) == saved


def test_a_result_of_an_earlier_version_is_read(found):
    """Its file has other names for four things."""
    text = found.to_json()
    for name, before in (
        ('"candidate":', '"scheme":'),
        ('"candidates":', '"schemes":'),
        ('"headroom":', '"room":'),
        ('"query_aware":', '"aware":'),
        ('"cache_score": "candidate"', '"cache_score": "scheme"'),
    ):
        assert name in text
        text = text.replace(name, before)
    assert SearchResult.from_json(text).to_json() == found.to_json()


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
    assert first.candidates[:, 0].mean() < 10


def test_every_scheme_is_scored_as_it_is_alone(model):
    its = Search(CONFIG, model=model, sets=sets(16))
    candidates = np.array([[4, 76], [40, 40], [76, 4], [20, 60]])
    together = its.context.evaluate("search", candidates)
    for row, candidate in enumerate(candidates):
        alone = PopulationEvaluator(model, batch=1)
        blocks = alone.place(its.context.reader.read(its.context.sets.search, 96, 2))
        np.testing.assert_array_equal(alone.evaluate(candidate[None], blocks, 16).exact[0], together.exact[row])


def test_budgets_of_each_head(model):
    """Four numbers where there were two; what serves them keeps the most of a layer's heads."""
    config = dataclasses.replace(CONFIG, search="heads", warm_start="uniform", expand=(20,))
    result = search(config, model=model, sets=sets(24), progress=False)
    assert result.chosen.candidate is not None
    assert len(result.chosen.candidate) == 4
    assert sum(result.chosen.candidate) == 160
    assert max(result.chosen.candidate[:2]) <= WINDOW + 6
    for budget, row in zip(result.profile.layers, np.reshape(result.chosen.candidate, (2, 2)).tolist(), strict=True):
        if budget.head_tokens is not None:
            assert budget.head_tokens == tuple(row)
        assert budget.capacity == min(max(row) + config.headroom, MODEL.max_position)
    assert sum(result.expanded[20][-1].candidate or ()) == 80


def test_the_numbers_of_rocketkv(model):
    """Layer 1 must keep, and layer 0 need not: at equal traffic evolution finds more than RocketKV's own split."""
    config = dataclasses.replace(
        CONFIG, search="rocketkv", token_budget=24, headroom=8, evaluations=60, group_layers=8, warm_start="uniform"
    )
    result = search(config, model=model, sets=sets(16), progress=False)
    found, even = result.outcome("evolution"), result.outcome("uniform")
    assert found.test.mean > even.test.mean
    assert result.chosen.name == "evolution"
    assert {outcome.name for outcome in result.outcomes} == {FULL, "evolution", "uniform"}
    for budget in result.profile.layers:
        assert budget.selected_tokens is not None
        assert budget.page_size == 4


def test_searches_on_the_same_samples_share_what_was_read(model):
    """Another budget and mode, the same prompts: the results are those of searches that read them anew."""
    config = dataclasses.replace(CONFIG, evaluations=20)
    context = Search(config, model=model, sets=sets(16)).context
    other = dataclasses.replace(config, token_budget=30, mode="paper")
    shared = search(other, context=context, progress=False)
    alone = search(other, model=model, sets=sets(16), progress=False)
    assert [dataclasses.replace(each, seconds=0.0) for each in shared.outcomes] == [
        dataclasses.replace(each, seconds=0.0) for each in alone.outcomes
    ]
    with pytest.raises(ValueError, match="does not read what"):
        search(dataclasses.replace(config, kernel=5), context=context, progress=False)
