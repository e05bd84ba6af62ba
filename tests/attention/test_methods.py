"""Every method by name: its budgets hold together, and a file of twenty lines adds another."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.eviction import Observation, PromptState
from kvjax.attention.methods import METHODS, Demand, LayerCacheConfig, Method, MethodOption, find_method
from kvjax.attention.selection import HybridPages, HybridTokens
from kvjax.budget import BudgetProfile, LayerBudget

DOCUMENT = Path(__file__).parents[2] / "docs" / "compression.md"
WINDOWS = (None, 512, None, None)
COMPRESSING = [name for name in METHODS if name != "full"]


def demand(context: int = 8192, token_budget: int = 256, headroom: int = 128) -> Demand:
    return Demand(WINDOWS, context, headroom, token_budget, 64)


def plans(method: Method, requested: Demand) -> list[LayerCacheConfig]:
    return [method.plan(budget, requested.headroom) for budget in method.profile(requested).layers]


@pytest.mark.parametrize("name", COMPRESSING)
@pytest.mark.parametrize(
    ("context", "token_budget", "headroom"), [(8192, 256, 128), (4096, 64, 64), (32_768, 1024, 512)]
)
def test_a_budget_becomes_plans_that_can_be_run(name, context, token_budget, headroom):
    requested = demand(context, token_budget, headroom)
    made = plans(METHODS[name], requested)
    assert made == plans(METHODS[name], requested)
    assert len({made[2], made[3]}) == (2 if name == "pyramidkv" else 1), "equal layers would be compiled twice"
    assert made[1] == LayerCacheConfig(512), "a sliding layer keeps its window"
    for plan in made:
        if plan.eviction is not None:
            assert plan.eviction.min_retained <= plan.max_retained <= plan.capacity - headroom
        if plan.selection is not None:
            assert plan.capacity % plan.selection.unit == 0
            assert plan.selection.tokens <= plan.capacity


@pytest.mark.parametrize("token_budget", [256, 512, 1024, 2048])
@pytest.mark.parametrize("context", [5000, 33_333, 131_072])
def test_large_views_have_whole_tiles_of_pages_and_keep_no_more(context, token_budget):
    requested = demand(context, token_budget, 512)
    budget, plan = METHODS["rocketkv"].profile(requested).layers[0], plans(METHODS["rocketkv"], requested)[0]
    pages = plan.capacity / budget.page_size
    assert pages % (8 if pages >= 256 + 7 else 1) == 0
    assert budget.capacity <= plan.capacity < budget.capacity + 8 * budget.page_size
    assert plan.max_retained == budget.capacity - requested.headroom


@pytest.mark.parametrize("name", COMPRESSING)
def test_what_fits_into_the_budget_is_kept_and_read_whole(name):
    context = 300
    for plan in plans(METHODS[name], demand(context, token_budget=512, headroom=64)):
        assert plan.eviction is None
        assert plan.capacity >= min(context, 512)
        assert plan.selection is None or plan.selection.dense_threshold >= context


@pytest.mark.parametrize("token_budget", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("context", [4096, 32_768, 131_072])
@pytest.mark.parametrize("name", ["rocketkv", "rocketkv-faithful"])
def test_rocketkv_reads_no_more_than_its_budget(name, context, token_budget):
    plan = plans(METHODS[name], demand(context, token_budget, headroom=64))[0]
    selection = plan.selection
    assert isinstance(selection, HybridPages | HybridTokens)
    pair = 2 * 64 * 2
    # the paper rounds the pages of a view up
    assert selection.read_bytes(plan.capacity, 64, 2) <= (token_budget + 1) * pair
    assert selection.tokens >= token_budget // 4
    if isinstance(selection, HybridPages):
        assert selection.tokens >= 2 * selection.page_size, "one page is the one being written"


def test_both_modes_of_rocketkv_keep_the_same():
    page, token = (plans(METHODS[name], demand())[0] for name in ("rocketkv", "rocketkv-faithful"))
    assert page.eviction == token.eviction
    assert page.max_retained == token.max_retained


def test_pyramid_falls_and_has_the_total_of_snapkv():
    pyramid, uniform = (
        [plan.max_retained for plan in plans(METHODS[name], demand()) if plan.eviction]
        for name in ("pyramidkv", "snapkv")
    )
    assert pyramid == sorted(pyramid, reverse=True)
    assert pyramid[0] > pyramid[-1]
    assert sum(pyramid) == sum(uniform) == 3 * 256


def test_quest_leaves_its_first_layers_dense():
    made = plans(METHODS["quest"], demand())
    assert [plan.selection is None for plan in made] == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "requested", "message"),
    [
        ("rocketkv", demand(token_budget=8), "token_budget=8 must be at least 16"),
        ("rocketkv", demand(headroom=8192), "max_new_tokens=8192"),
        ("rocketkv", demand(token_budget=16), "raise"),
        ("snapkv", demand(token_budget=16), "--headroom"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_out(name, requested, message):
    with pytest.raises(ValueError, match=message):
        plans(METHODS[name], requested)


def test_a_budget_that_a_method_does_not_spend_is_refused():
    selecting = LayerBudget.selecting(512, selected_tokens=64, page_size=8)
    with pytest.raises(ValueError, match="no effect with SnapKV"):
        METHODS["snapkv"].plan(selecting, 64)
    with pytest.raises(ValueError, match="use another method"):
        METHODS["quest"].plan(dataclasses.replace(selecting, selected_tokens=None, page_size=1), 64)
    with pytest.raises(ValueError, match="observation_window=8 has no effect: Quest has no eviction options; use anot"):
        METHODS["quest"].plan(LayerBudget.selecting(512, observation_window=8), 64)
    estimating = dataclasses.replace(selecting, selection_options=(("head_dims", 8),))
    with pytest.raises(ValueError, match="head_dims=8 has no effect: RocketKV has no selection options; use another"):
        METHODS["rocketkv"].plan(estimating, 64)


def evicting(capacity: int = 100, **options: Any) -> LayerBudget:
    return LayerBudget.selecting(capacity, **options)


def estimating(**options: Any) -> LayerBudget:
    return LayerBudget.selecting(100, selected_tokens=9, selection_options=options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (evicting(pooling_kernel=4, observation_window=32), "pooling_kernel=4 must be odd.*use 5"),
        (evicting(pooling_kernel=0, observation_window=32), "pooling_kernel=0 must be odd and at least 1.*use 1"),
        (evicting(pooling_kernel=-3, observation_window=32), "pooling_kernel=-3 must be .* at least 1.*use 1"),
        (evicting(observation_window=0), "observation_window=0 must be at least 1: 32 unless it is set"),
        (evicting(sinks=-1), "sinks=-1 must be at least 0: 0 unless it is set"),
        (
            evicting(observation_window=101),
            "observation_window=101.* must be at most capacity=100.*raise the capacity to 101",
        ),
        (evicting(31), "observation_window=32.* must be at most capacity=31.*raise the capacity to 32"),
        (evicting(20), "observation_window=32.* must be at most capacity=20"),
        (
            evicting(observation_window=90, sinks=11),
            "observation_window=90.*sinks=11 must be at most capacity=100.*raise the capacity to 101",
        ),
        (
            LayerBudget.selecting(100, observation_window=8, sinks=4, head_tokens=(12, 11)),
            r"head_tokens=\(12, 11\): a kv head keeps from 12, .* to capacity=100 tokens",
        ),
        (estimating(head_dims=0), "head_dims=0 must be at least 1"),
        (estimating(), "RocketKVFaithful needs the selection option head_dims: give it in the budget"),
        (
            evicting(pooling_kernal=3),
            r"RocketKVFaithful has no eviction option 'pooling_kernal' \(pooling_kernal=3\): did you mean "
            "pooling_kernel\\? it knows observation_window, pooling_kernel, sinks",
        ),
        (evicting(beta=3), r"no eviction option 'beta' \(beta=3\): it knows observation_window, pooling_kernel, sinks"),
    ],
)
def test_an_option_that_cannot_be_names_value_bound_and_way_out(budget, message):
    with pytest.raises(ValueError, match=message):
        METHODS["rocketkv-faithful"].plan(budget, 0)


def test_an_option_is_bounded_by_the_model():
    with pytest.raises(ValueError, match="head_dims=67 must be at most 64, which a head of the model has"):
        METHODS["rocketkv-faithful"].resolve(estimating(head_dims=67), head_dim=64)
    METHODS["rocketkv-faithful"].resolve(estimating(head_dims=64), head_dim=64)


@pytest.mark.parametrize("value", [True, 8.0, "8"])
@pytest.mark.parametrize("name", ["observation_window", "pooling_kernel", "sinks"])
def test_only_whole_numbers_are_options_that_count(name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r} is a .*: give an int"):
        METHODS["rocketkv"].plan(evicting(**{name: value}), 0)


def test_a_number_that_may_be_broken_may_be_whole_and_a_string_has_no_bounds():
    power, name = MethodOption("power", float, 0.5, minimum=0, maximum=2), MethodOption("name", str, "a")
    assert repr(power.check(1)) == "1.0"
    assert name.check("b") == "b"
    for wrong in (True, "1"):
        with pytest.raises(TypeError, match="give a float"):
            power.check(wrong)
    with pytest.raises(TypeError, match="name=1 is a int: give a string"):
        name.check(1)
    with pytest.raises(ValueError, match=r"power=2.5 must be at most 2: 0.5 unless it is set"):
        power.check(2.5)


@pytest.mark.parametrize("name", COMPRESSING)
def test_an_option_that_is_not_set_is_its_default(name):
    """One behaviour has one plan, however its budget is spelled."""
    for budget in METHODS[name].profile(demand()).layers:
        resolved = METHODS[name].resolve(budget)
        assert METHODS[name].resolve(resolved) == resolved
        assert METHODS[name].plan(resolved, 64) == METHODS[name].plan(budget, 64)
        if budget.eviction_options is not None:
            assert {option.name for option in METHODS[name].eviction_options} == dict(resolved.eviction_options).keys()
            bare = dataclasses.replace(budget, eviction_options=())
            assert METHODS[name].resolve(bare) == resolved, "its own profile has its defaults"


def test_the_documented_method_is_one(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 26
    (tmp_path / "lownorm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    plan = plans(find_method("lownorm:LowNorm"), demand())[0]
    assert plan.max_retained == 256
    assert plan.eviction is not None
    k = np.random.default_rng(0).normal(0, 1, (2, 300, 64)).astype(np.float32)
    queries = np.zeros((8, 4, 64), np.float32)
    state = PromptState(jnp.asarray(queries), jnp.asarray(k), jnp.asarray(k), jnp.int32(300), scale=0.1)
    retained = np.asarray(plan.eviction.select(state, max_retained=40, capacity=48))
    smallest = np.argsort(np.linalg.norm(k[:, :292], axis=-1), axis=-1)[:, :32]
    np.testing.assert_array_equal(retained[:, :32], np.sort(smallest))
    assert retained[:, 32:].tolist() == [[*range(292, 300), *[-1] * 8]] * 2
    del sys.modules["lownorm"]


def test_the_profiles_that_ship_plan_what_their_files_of_version_1_say():
    checked = 0
    for path in sorted((DOCUMENT.parents[1] / "configs" / "budgets").glob("*.json")):
        if ".search." in path.name:
            continue
        profile = BudgetProfile.load(path, BudgetProfile.made_for(path))
        for fields, budget in zip(json.loads(path.read_text())["layers"], profile.layers, strict=True):
            plan, window = METHODS["rocketkv"].plan(budget, 128), fields["observation_window"]
            expected = None
            if window is not None:
                expected = Observation(window, kernel=fields["pooling_kernel"], sinks=fields.get("sinks", 0))
            assert plan.eviction == expected
            assert plan.max_retained == (0 if expected is None else fields["capacity"] - 128)
            assert (plan.selection is None) == (fields["stage2_tokens"] is None)
            checked += 1
    assert checked >= 8


def test_every_method_is_documented():
    text = DOCUMENT.read_text()
    assert [name for name in METHODS if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rocket", "is not known: one of full, rocketkv"),
        ("nowhere:Method", "No module named 'nowhere'"),
        ("kvjax.budget:Nothing", "has no attribute"),
        ("kvjax.attention.methods:Method", "abstract"),
        ("collections:Counter", "derive it from"),
    ],
)
def test_an_unknown_method_says_what_would_be_one(name, message):
    with pytest.raises(ValueError, match=message):
        find_method(name)
