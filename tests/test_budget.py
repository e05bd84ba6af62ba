import dataclasses
import itertools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.budget import MAX_GROUP_LAYERS, BudgetProfile, LayerBudget, sorted_options
from kvjax.cache import View
from tests.budget_cases import WINDOWS, layer_budgets, selecting_budgets


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_view_holds_something(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}: a view holds at least one"):
        LayerBudget(capacity)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_tokens": (9,)}, r"head_tokens=\(9,\) has no effect while eviction_options is None.*at None"),
        ({"head_tokens": (), "eviction_options": ()}, r"head_tokens=\(\): a kv head keeps from 1 to capacity=100"),
        ({"head_tokens": (9, 101), "eviction_options": ()}, r"a kv head keeps from 1 to capacity=100 tokens"),
        ({"head_tokens": (0, 9), "eviction_options": ()}, r"a kv head keeps from 1 to capacity=100 tokens"),
        ({"page_size": 4}, "page_size=4 has no effect while selected_tokens is None.*leave page_size at 1"),
        (
            {"selection_options": (("head_dims", 64),)},
            r"selection_options=.*64.* has no effect while selected_tokens is None.*leave selection_options at \(\)",
        ),
        (
            {"selected_tokens": 0},
            "selected_tokens=0 must be at least 1 and below capacity=100: None reads the whole view",
        ),
        ({"selected_tokens": 100}, "selected_tokens=100 must be at least 1 and below capacity=100"),
        ({"selected_tokens": 9, "page_size": 0}, "page_size=0 must be 1 to capacity=100"),
        ({"selected_tokens": 9, "page_size": 101}, "page_size=101 must be 1 to capacity=100"),
        ({"eviction_options": (("b", 1), ("a", 1))}, "eviction_options are b, a: .*in their order: use sorted_options"),
        ({"eviction_options": (("a", 1), ("a", 2))}, "eviction_options are a, a: each name once"),
        ({"eviction_options": (("a", float("nan")),)}, "a=nan is not finite"),
    ],
)
def test_an_invalid_budget_names_value_bound_and_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerBudget(100, **fields)


@pytest.mark.parametrize("value", [True, 8.0, np.int64(8), "8"])
@pytest.mark.parametrize("name", ["capacity", "selected_tokens"])
def test_only_whole_numbers_are_taken(name, value):
    with pytest.raises(TypeError, match=name):
        LayerBudget(**{"capacity": 64, name: value})


def test_a_capacity_and_a_page_are_never_none():
    for name in ("capacity", "page_size"):
        with pytest.raises(TypeError, match=name):
            LayerBudget(**{"capacity": 64, name: None})


@pytest.mark.parametrize("options", [{"a": 1}, [("a", 1)], (("a", 1, 2),), (("a", None),), (("a", (1,)),), ((1, 1),)])
@pytest.mark.parametrize("name", ["eviction_options", "selection_options"])
def test_options_are_pairs_of_a_name_and_a_plain_value(name, options):
    with pytest.raises(TypeError, match=name):
        LayerBudget(64, selected_tokens=9, **{name: options})


def test_options_by_keywords_are_in_one_order():
    budget = LayerBudget.selecting(64, sinks=1, kernel=3, selected_tokens=9, selection_options={"d": 1, "c": 2})
    assert budget.eviction_options == (("kernel", 3), ("sinks", 1))
    assert budget.selection_options == (("c", 2), ("d", 1))
    assert LayerBudget.selecting(64).eviction_options == (), "the method's defaults"
    assert LayerBudget(64).eviction_options is None


def test_budgets_are_made_without_jax_or_pydantic():
    code = "import sys, kvjax.budget; print([name for name in ('jax', 'pydantic', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_budget_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerBudget(7).capacity = 8  # pyright: ignore[reportAttributeAccessIssue]


def test_full_keeps_the_context_or_the_window():
    profile = BudgetProfile.full([None, 100, 5000], 1536)
    assert [budget.capacity for budget in profile.layers] == [1536, 100, 1536]
    assert all(budget == LayerBudget(budget.capacity) for budget in profile.layers)


def test_equal_profiles_are_one_key():
    assert len({BudgetProfile.full([None, 7], 9), BudgetProfile((LayerBudget(9), LayerBudget(7)))}) == 1


def copy(profile: BudgetProfile) -> BudgetProfile:
    """An equal profile that shares no object with the first."""
    return BudgetProfile(tuple(LayerBudget(**dataclasses.asdict(budget)) for budget in profile.layers))


@hypothesis.given(st.lists(layer_budgets(), min_size=1, max_size=8))
def test_copies_are_equal_and_hash_equal(budgets):
    profile = BudgetProfile(tuple(budgets))
    assert copy(profile) == profile
    assert hash(copy(profile)) == hash(profile)


@hypothesis.given(layer_budgets(), st.data())
def test_every_field_tells_budgets_apart(budget, data):
    name = data.draw(st.sampled_from([field.name for field in dataclasses.fields(LayerBudget)]))
    fields = dataclasses.asdict(budget)
    more = data.draw(st.integers(1, 9))
    if name == "head_tokens":
        fields[name] = (*(fields[name] or ()), more)
    elif name.endswith("options"):
        fields[name] = (*(fields[name] or ()), ("\U0010ffff" * 9, more))
    else:
        fields[name] = (fields[name] or 0) + more
    try:
        other = LayerBudget(**fields)
    except ValueError:
        hypothesis.reject()
    assert other != budget
    assert BudgetProfile((other,)) != BudgetProfile((budget,))


def test_equal_profiles_share_one_compiled_step():
    traces = []

    def retained(profile: BudgetProfile, x: jax.Array) -> jax.Array:
        traces.append(profile)
        return x[: profile.layers[0].capacity]

    step = jax.jit(retained, static_argnums=0)
    x = jnp.arange(8)
    first = BudgetProfile.uniform([None, 3], 8, LayerBudget.selecting(5, observation_window=2, selected_tokens=4))
    for profile in (first, first, copy(first), first.within(8)):
        assert step(profile, x).shape == (5,)
    assert len(traces) == 1
    step(BudgetProfile.uniform([None, 3], 8, LayerBudget.selecting(5, observation_window=2, selected_tokens=3)), x)
    assert len(traces) == 2


def test_a_profile_without_layers_is_refused():
    with pytest.raises(ValueError, match="0 layers"):
        BudgetProfile(())


def test_a_profile_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the profile has 2 layers, the model 3"):
        BudgetProfile.full([None, None], 10).groups("abc")
    with pytest.raises(ValueError, match="the profile has 2 layers, the model 3"):
        BudgetProfile.full([None, None], 10).check([None] * 3, 10)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((LayerBudget(10), LayerBudget(5)), "layer 1 slides over 4 tokens and keeps exactly 4 of 10"),
        ((LayerBudget(10), LayerBudget.selecting(4, observation_window=2)), "layer 1 slides over 4 tokens"),
        ((LayerBudget(11), LayerBudget(4)), r"layer 0 has capacity=11, more than .* 10 tokens: .* within\(10\)"),
        ((LayerBudget(9), LayerBudget(4)), "layer 0 has capacity=9 .* of 10 tokens.*shorten the context to 9"),
    ],
)
def test_a_profile_under_which_a_model_would_forget_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        BudgetProfile(layers).check([None, 4], 10)


def test_within_drops_what_has_no_effect():
    dims = {"head_dims": 32}
    budget = LayerBudget.selecting(64, kernel=3, selected_tokens=16, page_size=8, selection_options=dims)
    assert budget.within(65) == budget
    assert budget.within(64) == LayerBudget(64, selected_tokens=16, page_size=8, selection_options=sorted_options(dims))
    assert budget.within(16) == LayerBudget(16)
    assert budget.within(99, 40) == LayerBudget.selecting(
        40, kernel=3, selected_tokens=16, page_size=8, selection_options=dims
    )
    assert LayerBudget(64, selected_tokens=3, page_size=8).within(5) == LayerBudget(5, selected_tokens=3, page_size=5)
    heads = LayerBudget.selecting(64, head_tokens=(9, 64))
    assert heads.within(99, 20).head_tokens == (9, 20)
    assert heads.within(64) == LayerBudget(64)


@hypothesis.given(WINDOWS, st.integers(1, 5000), st.integers(1, 5000), selecting_budgets())
def test_a_shorter_context_keeps_a_profile_valid(windows, context, other, budget):
    shorter, longer = sorted((context, other))
    profile = BudgetProfile.uniform(windows, longer, budget)
    cut = profile.within(shorter)
    cut.check(windows, shorter)
    assert cut == BudgetProfile.uniform(windows, shorter, budget)
    assert cut.within(shorter) == cut
    assert profile.within(longer) == profile


def test_bytes_of_a_layer_by_hand():
    # 10 entries of K and V, 2 heads of 4 dimensions, 2 bytes: 10 * 2 * 2 * 4 * 2
    assert LayerBudget(10).nbytes(2, 4, jnp.bfloat16) == 320
    assert LayerBudget(10, selected_tokens=5).nbytes(2, 4, "bfloat16") == 320  # pages of one: the key is its summary
    # and 3 pages (of 4, 4 and 2), a smallest and a largest key each: 3 * 2 * 2 * 4 * 2
    assert LayerBudget(10, selected_tokens=5, page_size=4).nbytes(2, 4, jnp.bfloat16) == 320 + 96


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float32", np.float16])
def test_bytes_are_those_of_the_views(dtype):
    profile = BudgetProfile.full([None, 100, 5000], 1536)
    views = [
        View.declare(slots=1, kv_heads=3, capacity=budget.capacity, head_dim=24, dtype=dtype)
        for budget in profile.layers
    ]
    assert profile.nbytes(3, 24, dtype) == sum(view.k.nbytes + view.v.nbytes for view in views)
    assert profile.tokens == 1536 + 100 + 1536


@hypothesis.given(st.lists(st.tuples(st.integers(1, 2), st.sampled_from("ab")), min_size=1, max_size=40))
def test_groups_are_the_longest_runs_of_equal_layers(layers):
    budgets, kinds = zip(*layers, strict=True)
    groups = BudgetProfile(tuple(map(LayerBudget, budgets))).groups(kinds)
    assert [layer for group in groups for layer in group] == list(range(len(layers)))
    for group in groups:
        assert 1 <= len(group) <= MAX_GROUP_LAYERS
        assert len({layers[layer] for layer in group}) == 1
    for before, after in itertools.pairwise(groups):
        assert len(before) == MAX_GROUP_LAYERS or layers[before[-1]] != layers[after[0]]


def test_a_difference_in_any_field_parts_groups():
    one, other = LayerBudget(9, selected_tokens=4), LayerBudget(9, selected_tokens=5)
    assert BudgetProfile((one, one, other, other)).groups("aaaa") == (range(2), range(2, 4))
