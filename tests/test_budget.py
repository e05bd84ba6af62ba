import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.budget import MAX_GROUP_LAYERS, BudgetProfile, LayerBudget


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_view_holds_something(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}: a view holds at least one"):
        LayerBudget(capacity)


def test_full_keeps_the_context_or_the_window():
    profile = BudgetProfile.full([None, 100, 5000], 1536)
    assert [budget.capacity for budget in profile.layers] == [1536, 100, 1536]


def test_equal_profiles_are_one_key():
    assert len({BudgetProfile.full([None, 7], 9), BudgetProfile((LayerBudget(9), LayerBudget(7)))}) == 1


def test_a_profile_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the profile has 2 layers, the model 3"):
        BudgetProfile.full([None, None], 10).groups("abc")


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
