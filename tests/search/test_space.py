"""Candidates of one exact cost: whatever the weights, and the paper's score of what a candidate costs."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kvjax.search.spaces.tokens import TokenSpace, cache_score

FINITE = st.one_of(st.just(0.0), st.floats(1e-200, 1e200), st.sampled_from([1.0, 2.0, 3.0]))
BAD = [np.nan, np.inf, -np.inf, -1.0, -1e-300]


@st.composite
def spaces(draw: st.DrawFn) -> TokenSpace:
    floor, mean, ceiling = sorted(draw(st.lists(st.integers(0, 3000), min_size=3, max_size=3)))
    return TokenSpace(draw(st.integers(1, 24)), mean, floor, ceiling)


@st.composite
def weighted(draw: st.DrawFn, weight: st.SearchStrategy[float]) -> tuple[TokenSpace, np.ndarray]:
    space = draw(spaces())
    return space, np.array(draw(st.lists(weight, min_size=space.layers, max_size=space.layers)), np.float64)


@hypothesis.given(weighted(FINITE))
def test_every_projection_costs_the_total_and_stays_in_bounds(case):
    space, weights = case
    candidate = space.project(weights)
    assert sum(candidate) == space.total == space.layers * space.mean
    assert min(candidate) >= space.floor
    assert max(candidate) <= space.ceiling
    space.check(np.array([candidate]))


@hypothesis.given(weighted(FINITE))
def test_a_larger_weight_never_gets_fewer(case):
    space, weights = case
    candidate = np.array(space.project(weights))
    for layer, weight in enumerate(weights):
        assert (candidate[weights > weight] >= candidate[layer]).all()


@hypothesis.given(weighted(FINITE))
def test_equal_weights_differ_by_one_token_at_most(case):
    space, weights = case
    candidate = np.array(space.project(weights))
    for weight in set(weights.tolist()):
        assert np.ptp(candidate[weights == weight]) <= 1


@hypothesis.given(weighted(FINITE), st.integers(-300, 300))
def test_only_proportions_count(case, power):
    """Powers of two, because they scale a float without rounding it."""
    space, weights = case
    assert space.project(np.ldexp(weights, power)) == space.project(weights)


@hypothesis.given(weighted(st.floats(0.01, 100)))
def test_shares_are_proportional_where_nothing_is_full(case):
    space, weights = case
    candidate = space.project(weights)
    hypothesis.assume(max(candidate) < space.ceiling)
    left = space.total - space.layers * space.floor
    whole = sum(Fraction(float(weight)) for weight in weights)
    for retained, weight in zip(candidate, weights, strict=True):
        assert abs(retained - space.floor - left * Fraction(float(weight)) / whole) < 1


@pytest.mark.parametrize("bad", BAD)
@hypothesis.given(case=weighted(FINITE), at=st.integers(0, 23))
def test_what_is_no_weight_is_refused(bad, case, at):
    space, weights = case
    weights[at % len(weights)] = bad
    with pytest.raises(ValueError, match="give finite numbers, none negative"):
        space.project(weights)


def test_layers_without_a_weight_get_the_floor_unless_the_others_are_full():
    space = TokenSpace(4, 100, 10, 390)
    assert space.project(np.array([0.0, 1.0, 1.0, 2.0])) == (10, 100, 100, 190)
    assert space.project(np.array([0.0, 0.0, 0.0, 1.0])) == (10, 10, 10, 370)
    # 390 are full, and what is left over goes to the rest in equal parts
    assert TokenSpace(4, 102, 4, 390).project(np.array([0.0, 0.0, 0.0, 1.0])) == (6, 6, 6, 390)
    assert space.project(np.zeros(4)) == space.uniform


def test_what_a_full_layer_cannot_take_goes_to_the_others_in_their_proportions():
    assert TokenSpace(3, 100, 0, 150).project(np.array([8.0, 2.0, 1.0])) == (150, 100, 50)


def test_what_is_missing_goes_to_the_largest_remainders():
    # shares of 10 tokens: 4.5, 2.2, 3.3
    assert TokenSpace(3, 10, 0, 30).project(np.array([13.5, 6.6, 9.9])) == (13, 7, 10)
    assert TokenSpace(4, 5, 0, 30).project(np.array([1.0, 1.0, 1.0, 4.0])) == (3, 3, 3, 11)


def test_one_float_is_not_worth_a_token():
    """Weights that differ beyond float64's digits still share out exactly, whatever their sizes."""
    space = TokenSpace(3, 1000, 12, 3000)
    assert sum(space.project(np.array([1e-300, 1.0, 1e300]))) == 3000
    assert space.project(np.array([5e-324, 5e-324, 1e-323])) == space.project(np.array([1.0, 1.0, 2.0]))


@hypothesis.given(weighted(FINITE))
def test_a_scheme_of_the_space_is_complete(case):
    space, weights = case
    candidate = space.project(weights)
    assert space.completed(np.array(candidate, np.float64)) == space.completed(np.array(candidate)) == candidate


@hypothesis.given(weighted(FINITE))
def test_completion_costs_the_total(case):
    space, numbers = case
    space.check(np.array([space.completed(numbers)]))


def test_a_scheme_expands_to_another_mean():
    found = np.array([12.0, 112.0, 212.0, 64.0])
    assert TokenSpace(4, 100, 12, 1000).completed(found) == (12, 112, 212, 64)
    assert TokenSpace(4, 188, 12, 1000).completed(found) == (12, 212, 412, 116)  # twice what lies beyond the floors
    assert TokenSpace(4, 56, 12, 1000).completed(found) == (12, 62, 112, 38)
    assert TokenSpace(4, 188, 12, 300).completed(found) == (12, 286, 300, 154)  # and at most the ceiling
    assert TokenSpace(2, 12, 12, 1000).completed(np.array([50.0, 12.0])) == (12, 12)


def test_what_lies_below_the_floor_is_raised_to_it():
    assert TokenSpace(3, 20, 10, 100).completed(np.array([0.0, 15.0, 25.0])) == (10, 18, 32)


@pytest.mark.parametrize(
    ("candidate", "mean", "score"),
    [
        ((100, 100), 100, 1.0),
        ((150, 50), 100, 1.0),  # the mean counts, not how it is shared
        ((110, 110), 100, 0.9),  # a tenth too many: 1 - 0.1
        ((90, 90), 100, 0.98),  # a tenth too few: 1 - 0.2 * 0.1, a fifth of it
        ((150, 150), 100, 0.5),
        ((50, 50), 100, 0.9),
        ((200, 200), 100, 0.0),
        ((500, 100), 100, 0.0),  # never below zero
        ((0, 0), 100, 0.8),
        ((128, 256, 512, 1024), 512, 1 - 0.2 * (1 - 480 / 512)),
    ],
)
def test_the_papers_cache_score(candidate, mean, score):
    assert cache_score(candidate, mean) == pytest.approx(score, abs=1e-12)


def test_groups_are_contiguous_and_in_order():
    assert TokenSpace(20, 10, 0, 20).groups == (range(8), range(8, 16), range(16, 20))
    assert TokenSpace(8, 10, 0, 20).groups == (range(8),)
    assert TokenSpace(3, 10, 0, 20, group_layers=1).groups == (range(1), range(1, 2), range(2, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0, 10, 0, 20), "layers=0"),
        ((4, 10, 0, 20, 0), "group_layers=0"),
        ((4, 10, 11, 20), "mean of 10 tokens must be from the floor of 11"),
        ((4, 21, 0, 20), "ceiling of 20"),
        ((4, 10, -1, 20), "floor of -1"),
    ],
)
def test_a_space_without_a_scheme_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenSpace(*fields)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([[10, 10]], "shape"),
        ([[10, 10, 10], [31, 0, -1]], r"leaves \[0, 30\]"),
        ([[10, 10, 11]], r"differ from the total of 30 tokens by \[1\]"),
    ],
)
def test_check_names_what_is_wrong(candidates, message):
    with pytest.raises(ValueError, match=message):
        TokenSpace(3, 10, 0, 30).check(np.array(candidates))
