"""A request with a token budget of its own: what it keeps and says is what an engine of that budget does."""

import dataclasses

import numpy as np
import pytest

from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.engine import Engine, EngineConfig
from kvjax.engine.config import ResolvedConfig
from kvjax.engine.device.cache_config import CacheConfig
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle

CONTEXT, ROOM = 640, 24
BUDGETS = {"rocketkv": (128, 96), "snapkv": (48, 36), "topk": (40, 17)}  # of the engine, and a smaller one
RETAINED = dataclasses.replace(GREEDY, max_tokens=2 * ROOM + 9, logprobs=3, retained=True)  # selected anew, twice


def config(method: str | None, token_budget: int | None, **options) -> EngineConfig:
    defaults = {"max_model_len": CONTEXT, "max_num_seqs": 3, "headroom": ROOM}
    return EngineConfig(method=method, token_budget=token_budget, **defaults | options)


def declared(method: str | None, token_budget: int | None = None, **options) -> CacheConfig:
    return CacheConfig.declare(
        tiny.CONFIG, ResolvedConfig.resolve(config(method, token_budget, **options), CONTEXT, "cpu")
    )


@pytest.fixture(scope="module", params=BUDGETS)
def pair(request, tmp_path_factory):
    """An engine, and one that was started with the smaller budget; its budget."""
    path = tiny.write(tmp_path_factory.mktemp("budget"))
    own, small = BUDGETS[request.param]
    with (
        Engine.from_pretrained(path, config(request.param, small)) as smaller,
        Engine.from_pretrained(path, config(request.param, own)) as engine,  # the last: it counts all that is compiled
    ):
        assert engine.caches.plans != smaller.caches.plans
        assert [plan.page_size for plan in engine.caches.plans] == [plan.page_size for plan in smaller.caches.plans]
        yield engine, smaller, small
        settle(engine)
        assert engine.stats().compiles_after_warmup == 0


@pytest.mark.parametrize("length", [30, 110, 300, 550])
def test_it_is_what_an_engine_of_that_budget_says(pair, length):
    engine, smaller, budget = pair
    prompt = tiny.prompt(length)
    own = dataclasses.replace(RETAINED, token_budget=budget)
    [ours], [theirs] = generate(engine, [(prompt, own)]), generate(smaller, [(prompt, RETAINED)])
    for mine, its in zip(ours.retained, theirs.retained, strict=True):
        np.testing.assert_array_equal(mine[:, : its.shape[1]], its)
        assert (mine[:, its.shape[1] :] < 0).all()
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(*([each.logprob for each in one.logprobs] for one in (ours, theirs)), atol=1e-4)


def test_unlike_budgets_in_one_batch_do_not_meet(pair):
    """To the bit; and so does a slot that another budget had before."""
    engine, _, budget = pair
    budgets = [None, budget, engine.layout.token_budget, budget + 7, budget, None, budget + 1]
    each = [
        (tiny.prompt(500 - 40 * index), dataclasses.replace(RETAINED, token_budget=own))
        for index, own in enumerate(budgets)
    ]
    together = generate(engine, each)
    for request, one in zip(each, together, strict=True):
        [alone] = generate(engine, [request])
        assert (one.tokens, one.logprobs) == (alone.tokens, alone.logprobs)
        for ours, theirs in zip(one.retained, alone.retained, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    settle(engine)


def test_the_engines_own_budget_is_no_other(pair):
    engine, _, budget = pair
    prompt, own = tiny.prompt(500), dataclasses.replace(RETAINED, token_budget=engine.layout.token_budget)
    [given], [left_out] = generate(engine, [(prompt, own)]), generate(engine, [(prompt, RETAINED)])
    [small] = generate(engine, [(prompt, dataclasses.replace(RETAINED, token_budget=budget))])
    assert (given.tokens, given.logprobs) == (left_out.tokens, left_out.logprobs)
    assert given.logprobs != small.logprobs


def test_what_is_refused_says_what_is_allowed(pair):
    engine, _, _ = pair
    most = engine.layout.token_budget
    with pytest.raises(ValueError, match=rf"token_budget={most + 1} is outside \[\d+, {most}\], of which {most} is"):
        generate(engine, [([1], dataclasses.replace(RETAINED, token_budget=most + 1))])


@pytest.mark.parametrize("method", ["rocketkv", "rocketkv-stage1", "snapkv", "pyramidkv", "streaming", "quest", "topk"])
def test_all_budgets_from_the_least_to_its_own(method):
    """With equal pages the plans are those of an engine of that budget; with others its own pages stay."""
    caches = declared(method, 128, reselect=False)
    pages = max(plan.page_size for plan in caches.plans)
    equal = 0
    for budget in range(caches._least_budget, 128):
        within = caches.within(budget)
        assert max(plan.page_size for plan in within.plans) == pages
        assert all(ours.serves(theirs) for ours, theirs in zip(caches.plans, within.plans, strict=True))
        assert within.read_bytes(600) <= caches.read_bytes(600)
        alike = declared(method, budget, reselect=False)
        if max(plan.page_size for plan in alike.plans) == pages:
            equal += 1
            assert within.plans == alike.plans
            assert [within.headroom(length) for length in (5, 60, 600)] == [
                alike.headroom(length) for length in (5, 60, 600)
            ]
            assert within.retained_bytes(600) == alike.retained_bytes(600)
    assert equal > 20
    assert caches.within(None) is caches.within(128) is caches


def test_where_shapes_follow_the_budget_few_others_or_none_are_served():
    with pytest.raises(ValueError, match=r"token_budget=32 is outside \[60, 64\]"):
        declared("rocketkv-stage2", 64).within(32)
    whole = declared("rocketkv", CONTEXT)
    with pytest.raises(
        ValueError, match=f"'rocketkv' with a budget of {CONTEXT} serves no other: give {CONTEXT}, or leave it out"
    ):
        whole.within(64)


def test_budgets_of_a_file_and_none_at_all_are_not_cut(tmp_path):
    with pytest.raises(ValueError, match="token_budget=64: this engine has no budget, and none a request: leave it"):
        declared("full").within(64)
    path = tmp_path / "budgets.json"
    windows = [layer.window for layer in tiny.CONFIG.layers]
    profile = BudgetProfile.uniform(windows, CONTEXT, LayerBudget.selecting(100))
    profile.save(path, ModelFingerprint.of(tiny.CONFIG))
    with pytest.raises(ValueError, match=r"this engine has the budgets of .*budgets\.json"):
        declared("rocketkv-stage1", budgets=str(path)).within(64)
