"""What evolution is measured against: each rule and each search, at the exact total."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from kvjax.budget.split import pyramid_capacities
from kvjax.search.allocators.allocator import Allocator, Problem, State
from kvjax.search.allocators.greedy import Greedy
from kvjax.search.allocators.random_search import RandomSearch
from kvjax.search.allocators.rules import ANCHORS, Entropy, InversePyramid, Pyramid, Uniform
from kvjax.search.evaluators.scores import Scores
from kvjax.search.generation import AllocatorRun
from kvjax.search.objective import Objective
from kvjax.search.spaces import TokenSpace


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    floor, mean, ceiling = sorted(draw(st.lists(st.integers(1, 2000), min_size=3, max_size=3)))
    space = TokenSpace(draw(st.integers(1, 12)), mean, floor, ceiling)
    return Problem(space, np.array(draw(st.lists(st.floats(0, 12), min_size=space.layers, max_size=space.layers))))


def flat(layers: int = 8, mean: int = 100, floor: int = 12, ceiling: int = 600) -> Problem:
    return Problem(TokenSpace(layers, mean, floor, ceiling), np.full(layers, 2.5))


def asked(allocator: Allocator, problem: Problem, fitness: object = None, state: State | None = None) -> np.ndarray:
    """All that an allocator asks for, in one array."""
    state = allocator.begin(problem, 3) if state is None else state
    found = []
    while True:
        candidates, state = allocator.ask(problem, state)
        if not len(candidates):
            return np.concatenate(found)
        worth = candidates.min(axis=1).astype(np.float64) if fitness is None else fitness(candidates)
        state = allocator.tell(problem, state, candidates, worth)
        found.append(candidates)


@pytest.mark.parametrize("rule", ANCHORS, ids=lambda rule: rule.name)
@hypothesis.given(problem=problems())
def test_a_rule_asks_once_for_one_scheme_of_the_space(rule, problem):
    candidates = asked(rule, problem)
    assert len(candidates) == 1
    problem.space.check(candidates)


@hypothesis.given(problem=problems())
def test_random_search_stays_in_the_space(problem):
    candidates = asked(RandomSearch(evaluations=25), problem)
    assert len(candidates) == 25
    problem.space.check(candidates)


@hypothesis.given(problem=problems(), seed=st.integers(0, 1000))
def test_greedy_ends_in_the_space(problem, seed):
    rng = np.random.default_rng(seed)
    candidates = asked(Greedy(), problem, lambda candidates: rng.random(len(candidates)))
    problem.space.check(candidates[-1:])
    assert candidates.min() >= problem.space.floor
    assert candidates.max() <= problem.space.ceiling


def test_uniform_is_uniform():
    assert Uniform().candidate(flat()) == (100,) * 8


def test_the_pyramid_is_that_of_budgets():
    falling = pyramid_capacities(8, 100, 12, 600, 20)
    assert Pyramid().candidate(flat()) == tuple(falling)
    assert falling[0] > falling[-1]
    assert InversePyramid().candidate(flat()) == tuple(reversed(falling))
    assert Pyramid(beta=1).candidate(flat()) == (100,) * 8


def test_entropy_shares_what_is_beyond_the_floors_by_the_number_of_tokens_looked_at():
    assert Entropy().candidate(flat()) == (100,) * 8
    looked_at = np.log([10.0, 20.0, 30.0, 40.0])
    assert Entropy().candidate(Problem(TokenSpace(4, 62, 12, 600), looked_at)) == (32, 52, 72, 92)
    assert Entropy().candidate(Problem(TokenSpace(4, 62, 12, 600), looked_at + 1000)) == (32, 52, 72, 92)


def test_random_search_draws_other_schemes_with_another_seed_and_goes_on_to_the_bit():
    problem, search = flat(), RandomSearch(evaluations=34)
    whole = asked(search, problem)
    assert len(np.unique(whole, axis=0)) == 34
    first, state = search.ask(problem, search.begin(problem, 3))
    leaves, tree = jax.tree.flatten(search.tell(problem, state, first, np.zeros(len(first))))
    rest = asked(search, problem, state=jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves]))
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
    assert (search.ask(problem, search.begin(problem, 4))[0] != first).any()


def needs(gains: np.ndarray, needed: np.ndarray):
    """Utility that adds up over layers: each gains by every token until it has what it needs."""
    return lambda candidates: (gains * np.minimum(candidates, needed)).sum(axis=1)


def test_greedy_measures_each_layer_at_each_size_alone_and_then_judges_what_it_chose():
    problem, greedy = flat(), Greedy()
    grid = greedy.grid(problem)
    assert (len(grid), grid[0], grid[-1]) == (6, 12, 600)
    candidates = asked(greedy, problem)
    assert len(candidates) == 48 + 1
    for row, (layer, size) in enumerate(itertools.product(range(8), grid)):
        assert candidates[row, layer] == size
        assert (np.delete(candidates[row], layer) == 600).all()
    # sizes that round to the same number are measured once
    assert len(asked(greedy, flat(ceiling=102))) == 8 * len(set(greedy.grid(flat(ceiling=102)))) + 1
    assert len(asked(Greedy(sizes=4), problem)) == 32 + 1


@pytest.mark.parametrize("seed", range(5))
def test_greedy_finds_the_optimum_where_utility_adds_up(seed):
    """Each token goes where it gains most; needs are sizes that are measured, so that the curves are exact."""
    problem, greedy, rng = flat(6), Greedy(step=4), np.random.default_rng(seed)
    space, gains, needed = problem.space, rng.permutation(np.arange(1.0, 7)), rng.choice(greedy.grid(problem), 6)
    found = asked(greedy, problem, needs(gains, needed))[-1]
    best, left = np.full(6, 12), space.total - 6 * 12
    for layer in np.argsort(-gains):
        more = min(needed[layer] - 12, left)
        best[layer], left = best[layer] + more, left - more
    worth = needs(gains, needed)(np.array([found, best]))
    assert worth[0] >= worth[1] - 4 * gains.max()  # to the step
    assert worth[0] > needs(gains, needed)(np.array([space.uniform]))[0]


def test_greedy_finds_the_optimum_of_all_schemes_on_its_grid():
    """Against every candidate of a small space, with curves that are concave but not linear."""
    problem = flat(4, mean=30, floor=10, ceiling=80)
    greedy, worths = Greedy(sizes=8, step=5), np.array([1.0, 2.0, 4.0, 8.0])
    grid = greedy.grid(problem)
    curves = worths[:, None] * np.log(grid)

    def interpolated(candidates: np.ndarray) -> np.ndarray:
        return sum(np.interp(candidates[:, layer], grid, curves[layer]) for layer in range(4))

    found = asked(greedy, problem, interpolated)[-1]
    every = np.array([s for s in itertools.product(range(10, 81, 5), repeat=4) if sum(s) == 120])
    assert interpolated(found[None])[0] == pytest.approx(interpolated(every).max(), abs=1e-9)
    assert list(found) == sorted(found)


def test_what_greedy_chose_is_a_finalist_though_its_measurements_cost_and_score_more():
    problem, gains = flat(), np.arange(1.0, 9)
    utility = needs(gains, np.full(8, 600))

    def evaluate(candidates: np.ndarray) -> Scores:
        score = (utility(candidates) / 60_000).astype(np.float32)[:, None]
        return Scores(score, score, np.zeros_like(score))

    run = AllocatorRun(Greedy(), problem, Objective(), evaluate, 0)
    generations = list(run)
    assert run.evaluations == 49
    chosen = generations[-1].candidates[0]
    finalists = run.finalists(4)
    problem.space.check(finalists)
    assert chosen.tolist() in finalists.tolist()
