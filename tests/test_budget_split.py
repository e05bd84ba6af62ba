"""How budgets are shared out: RocketKV's table to the last integer, PyramidKV's series, EvolKV's groups."""

import decimal
import itertools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from kvjax.budget import BudgetProfile, LayerBudget, adaptive_split, sorted_options
from kvjax.budget.split import largest_remainder, pyramid_capacities
from tests.budget_cases import WINDOWS, selecting_budgets, window_of

CONTEXTS = (8192, 32768, 131072)
# capacity, page size, head dimensions and exact tokens for a head of 128, 128 new tokens
TABLE = {
    256: [(1448, 3, 67, 128), (1618, 3, 60, 128), (1296, 3, 75, 128)],
    512: [(2418, 3, 81, 256), (3191, 3, 61, 256), (3019, 3, 65, 256)],
    1024: [(3717, 2, 70, 512), (5792, 3, 67, 512), (6472, 3, 60, 512)],
    2048: [(5256, 2, 99, 1024), (9674, 3, 81, 1024), (12765, 3, 61, 1024)],
    4096: [(6841, 1, 76, 2048), (14868, 2, 70, 2048), (23170, 3, 67, 2048)],
}
CASES = [(t, s, row) for t, rows in TABLE.items() for s, row in zip(CONTEXTS, rows, strict=True)]


def numbers(budget: LayerBudget) -> tuple[int | None, ...]:
    dims = dict(budget.selection_options).get("head_dims")
    return budget.capacity, budget.page_size, dims, budget.selected_tokens


@pytest.mark.parametrize(("token_budget", "context", "expected"), CASES)
def test_the_published_split(token_budget, context, expected):
    budget = adaptive_split(context, 128, token_budget, 128)
    assert numbers(budget) == expected
    assert budget.eviction_options == (("observation_window", 32), ("pooling_kernel", 63))
    profile = BudgetProfile.adaptive([None, 512, None], context, token_budget, max_new_tokens=128, head_dim=128)
    assert profile.layers == (budget, LayerBudget(512), budget)


def split_by_decimals(s: int, n: int, t: int, d: int) -> tuple[int, int, int, int]:
    """The published formulas in decimals of 60 digits: what adaptive_split must give, reached another way."""
    with decimal.localcontext(prec=60):
        c = decimal.Decimal(s) / t
        r = min(
            decimal.Decimal("0.2") + decimal.Decimal("0.06") * c.ln() / decimal.Decimal(2).ln(), decimal.Decimal("0.8")
        )
        retained = s / c**r
        near = retained.to_integral_value()
        retained = near if abs(retained - near) < decimal.Decimal("1e-40") else retained
        cap = max(math.floor(retained), min(2 * n, s))
    c2 = max(Fraction(1), Fraction(cap, t))
    page = next(p for p in itertools.count(1) if p * p >= c2)
    page = 1 if page > c2 else page
    return cap, page, max(math.floor(Fraction(d * page) / c2), 1), t // 2


SPLITS = st.tuples(st.integers(16, 8192), st.integers(1, 400_000), st.integers(32, 16384), st.integers(1, 256))


@hypothesis.given(SPLITS)
def test_the_split_follows_the_formulas_everywhere(drawn):
    token_budget, more, new, head_dim = drawn
    context = max(token_budget, new + 32) + more
    budget = adaptive_split(context, new, token_budget, head_dim)
    assert numbers(budget) == split_by_decimals(context, new, token_budget, head_dim)
    assert token_budget <= budget.capacity <= context
    assert (budget.eviction_options is None) == (budget.capacity == context)
    assert 1 <= dict(budget.selection_options)["head_dims"] <= head_dim


@pytest.mark.parametrize(("context", "token_budget", "capacity"), [(2**18, 2**8, 2**10), (2**20, 2**10, 2**12)])
def test_a_whole_capacity_is_not_lost_to_rounding(context, token_budget, capacity):
    """c = 1,024 and r = 0.8 make c**r 256; a logarithm that errs in its last bit makes it a little more."""
    assert adaptive_split(context, 128, token_budget, 128).capacity == capacity


def test_a_context_within_the_budget_is_dense():
    for context in (300, 511, 512):
        assert adaptive_split(context, 128, 512, 64) == LayerBudget(context)
        windows = [None, 200, 9999]
        profile = BudgetProfile.adaptive(windows, context, 512, max_new_tokens=128, head_dim=64)
        assert profile == BudgetProfile.full(windows, context)
    assert adaptive_split(513, 128, 512, 64).selected_tokens == 256


def test_room_for_the_new_tokens_is_kept():
    """By hand: c = 4, r = 0.32, 1024 / 4**0.32 = 657.1; 2 * 400 is more; c2 = 3.125 and sqrt is 1.77."""
    assert numbers(adaptive_split(1024, 128, 256, 100)) == (657, 2, 77, 128)
    assert numbers(adaptive_split(1024, 400, 256, 100)) == (800, 2, 64, 128)
    everything = adaptive_split(1024, 600, 256, 100)  # 2 * 600 is more than there is: nothing is evicted
    assert everything == LayerBudget(
        1024, selected_tokens=128, page_size=2, selection_options=sorted_options({"head_dims": 50})
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4096, 128, 15, 128), "token_budget=15 must be at least 16"),
        ((4096, 0, 256, 128), "max_new_tokens=0 must be at least 1 and below context=4096"),
        ((4096, 4096, 256, 128), "max_new_tokens=4096 must be .* below context=4096"),
        ((4096, 128, 256, 0), "head_dim=0 must be at least 1"),
        ((64, 33, 16, 128), "capacity=64 entries 31 are left .* max_new_tokens=33, but observation_window=32"),
    ],
)
def test_a_split_that_cannot_be_names_value_bound_and_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        adaptive_split(*arguments)


@hypothesis.given(st.lists(st.integers(16, 5000), min_size=2, max_size=6), st.integers(300, 200_000))
def test_a_larger_budget_never_keeps_less(token_budgets, context):
    splits = [adaptive_split(context, 64, t, 128) for t in sorted(token_budgets)]
    reads = [budget.selected_tokens or budget.capacity for budget in splits]
    assert [budget.capacity for budget in splits] == sorted(budget.capacity for budget in splits)
    assert reads == sorted(reads)


def test_a_pyramid_by_hand():
    # mean 100 + a window of 20, beta 20: last 5, first 195, steps of 190 / 4 = 47.5; of 147.5 and 52.5 the first wins
    assert pyramid_capacities(5, 120, 20, 1000) == [215, 168, 120, 72, 25]
    assert pyramid_capacities(5, 120, 20, 1000, beta=1) == [120] * 5
    assert pyramid_capacities(5, 120, 20, 170) == [170, 145, 120, 95, 70]  # flattened to a context of 170
    assert pyramid_capacities(5, 170, 20, 170) == [170] * 5
    assert pyramid_capacities(1, 120, 20, 1000) == [120]
    assert pyramid_capacities(2, 20, 20, 1000) == [20, 20]


@pytest.mark.parametrize("beta", [0.5, 0, -1, math.inf, math.nan])
def test_a_pyramid_that_rises_is_refused(beta):
    with pytest.raises(ValueError, match=r"beta=.* must be at least 1"):
        BudgetProfile.pyramid([None] * 4, 1000, LayerBudget.selecting(100), beta)


@pytest.mark.parametrize("mean", [19, 1001])
def test_a_mean_out_of_bounds_is_refused(mean):
    with pytest.raises(ValueError, match=f"the mean capacity {mean} must be from 20, .* to 1000"):
        pyramid_capacities(3, mean, 20, 1000)


@hypothesis.given(WINDOWS, st.integers(1, 5000), selecting_budgets(), st.floats(1, 1e6))
def test_a_pyramid_has_the_total_of_uniform_and_falls(windows, context, budget, beta):
    pyramid = BudgetProfile.pyramid(windows, context, budget, beta, least=window_of(budget))
    uniform = BudgetProfile.uniform(windows, context, budget)
    assert pyramid.tokens == uniform.tokens
    pyramid.check(windows, context)
    capacities = [its.capacity for its, window in zip(pyramid.layers, windows, strict=True) if not window]
    assert capacities == sorted(capacities, reverse=True)
    least = min(window_of(budget), context)
    assert all(least <= capacity <= context for capacity in capacities)
    steps = [a - b for a, b in itertools.pairwise(capacities)]
    assert not steps or max(steps) - min(steps) <= 2  # one series, rounded
    for its, flat, window in zip(pyramid.layers, uniform.layers, windows, strict=True):
        assert its == flat if window else its.capacity <= context


@hypothesis.given(st.lists(st.fractions(0, 100, max_denominator=50), min_size=1, max_size=20))
def test_largest_remainder_keeps_the_sum_and_moves_nothing_by_one(shares):
    shares[0] += math.ceil(sum(shares)) - sum(shares)
    rounded = largest_remainder(shares)
    assert sum(rounded) == sum(shares)
    assert all(abs(whole - share) < 1 for whole, share in zip(rounded, shares, strict=True))
    falling = sorted(shares, reverse=True)
    assert largest_remainder(falling) == sorted(largest_remainder(falling), reverse=True)


@hypothesis.given(WINDOWS, st.integers(1, 5000), selecting_budgets())
def test_uniform_leaves_sliding_layers_alone(windows, context, budget):
    profile = BudgetProfile.uniform(windows, context, budget)
    full = BudgetProfile.full(windows, context)
    profile.check(windows, context)
    for its, window, whole in zip(profile.layers, windows, full.layers, strict=True):
        assert its == (whole if window else budget.within(context))
        assert its.capacity <= whole.capacity <= context


def test_a_budget_that_forgets_without_choosing_is_refused():
    for make in (BudgetProfile.uniform, BudgetProfile.pyramid):
        with pytest.raises(ValueError, match="eviction_options is None, so nothing would choose"):
            make([None, None], 1000, LayerBudget(999))
    assert BudgetProfile.uniform([None, 7], 1000, LayerBudget(1000)) == BudgetProfile.full([None, 7], 1000)


def test_groups_of_layers_by_hand():
    like = LayerBudget.selecting(64, selected_tokens=40, page_size=4)
    windows = [None, 16, None, None, 16, None, None]
    profile = BudgetProfile.from_group_budgets(windows, 100, [50, 400, 33], like, group_layers=2)
    first = LayerBudget.selecting(50, selected_tokens=40, page_size=4)
    second = LayerBudget(100, selected_tokens=40, page_size=4)  # cut to the context: nothing to choose
    third = LayerBudget.selecting(33)  # no more than a step reads: no stage 2
    slides = LayerBudget(16)
    assert profile.layers == (first, slides, first, second, slides, second, third)
    assert profile.groups([0] * 7) == tuple(range(a, a + 1) for a in range(7))


def test_groups_are_of_eight_layers():
    profile = BudgetProfile.from_group_budgets([None] * 20, 4096, [100, 300, 200], LayerBudget.selecting(64))
    assert [budget.capacity for budget in profile.layers] == [100] * 8 + [300] * 8 + [200] * 4
    assert profile.groups([0] * 20) == (range(8), range(8, 16), range(16, 20))


@pytest.mark.parametrize(
    ("capacities", "group_layers", "message"),
    [
        ([100, 100, 100], 8, "3 capacities for 9 layers that do not slide, in groups of 8: give 2, one a group"),
        ([100], 4, "1 capacities for 9 layers that do not slide, in groups of 4: give 3"),
        ([100], 0, "group_layers=0 must be at least 1"),
        ([100, 0, 100], 4, "capacity=0"),
    ],
)
def test_group_budgets_that_do_not_fit_are_refused(capacities, group_layers, message):
    windows = [None] * 9 + [64]
    with pytest.raises(ValueError, match=message):
        BudgetProfile.from_group_budgets(windows, 1000, capacities, LayerBudget.selecting(64), group_layers)


@hypothesis.given(WINDOWS, st.integers(1, 5000), selecting_budgets(), st.integers(1, 9), st.data())
def test_group_budgets_never_exceed_the_context_and_grow_with_their_number(windows, context, like, size, data):
    count = sum(window is None for window in windows)
    number = st.integers(1, 6000)
    capacities = data.draw(st.lists(number, min_size=-(-count // size), max_size=-(-count // size)))
    profile = BudgetProfile.from_group_budgets(windows, context, capacities, like, size)
    profile.check(windows, context)
    more = BudgetProfile.from_group_budgets(windows, context, [each + 1 for each in capacities], like, size)
    assert profile.tokens <= more.tokens <= BudgetProfile.full(windows, context).tokens


def test_a_model_whose_layers_all_slide_has_nothing_to_choose():
    windows, like = [16, 16, 16], LayerBudget.selecting(64)
    full = BudgetProfile.full(windows, 100)
    assert BudgetProfile.uniform(windows, 100, like) == full
    assert BudgetProfile.pyramid(windows, 100, like) == full
    assert BudgetProfile.from_group_budgets(windows, 100, [], like) == full
    assert BudgetProfile.adaptive(windows, 100, 32, max_new_tokens=8, head_dim=16) == full
