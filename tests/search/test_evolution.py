"""CMA-ES over budgets: it survives ties, keeps to the total, goes group by group, and resumes to the bit."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evosax.algorithms import CMA_ES

from kvjax.search.allocators.allocator import Problem, State
from kvjax.search.allocators.evolution import Evolution, strict_ranks
from kvjax.search.spaces import TokenSpace

Fitness = Callable[[np.ndarray], np.ndarray]


def problem(layers: int = 8, mean: int = 100, floor: int = 10, ceiling: int = 400) -> Problem:
    return Problem(TokenSpace(layers, mean, floor, ceiling), np.zeros(layers))


def flat(candidates: np.ndarray) -> np.ndarray:
    return np.full(len(candidates), 0.5)


def towards(target: np.ndarray) -> Fitness:
    """1 at the target, and less by the mean distance to it as a share of the mean budget."""
    return lambda candidates: 1 - np.abs(candidates - target).mean(axis=1) / target.mean()


def run(
    evolution: Evolution,
    problem: Problem,
    fitness: Fitness,
    seed: int = 0,
    between: Callable[[State], State] = lambda state: state,
) -> tuple[State, list[np.ndarray], list[State]]:
    """Asks and tells until it ends: the last state, each generation's candidates, and the states after them."""
    state, asked, states = evolution.begin(problem, seed), [], []
    while True:
        candidates, state = evolution.ask(problem, between(state))
        if not len(candidates):
            return state, asked, states
        state = evolution.tell(problem, between(state), candidates, fitness(candidates))
        asked.append(candidates)
        states.append(state)


def through_numpy(state: State) -> State:
    """The state as a checkpoint gives it back: leaves of NumPy, in the same tree."""
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves])


@cache
def strategy(shaping: Callable | None) -> CMA_ES:
    settings = {} if shaping is None else {"fitness_shaping_fn": shaping}
    return CMA_ES(population_size=10, solution=jnp.zeros(8), **settings)


def sigmas(shaping: Callable | None, fitness: Callable[[np.ndarray], np.ndarray], generations: int = 60) -> list[float]:
    """Step sizes of evosax's CMA-ES, with its own shaping of fitness where none is given."""
    es = strategy(shaping)
    params = es.default_params.replace(std_init=0.3)
    key = jax.random.key(0)
    state, found = es.init(key, jnp.zeros(8), params), []
    for generation in range(generations):
        population, state = es.ask(jax.random.fold_in(key, generation), state, params)
        state, _ = es.tell(key, population, jnp.asarray(fitness(np.asarray(population)), jnp.float32), state, params)
        found.append(float(state.std))
    return found


def test_a_flat_objective_does_not_collapse_the_search():
    collapsed = sigmas(None, lambda population: np.zeros(len(population)))
    assert collapsed[-1] < 1e-4  # evosax's own shaping, from 0.3
    ours = sigmas(strict_ranks, lambda population: np.zeros(len(population)))
    assert 0.05 < min(ours) <= max(ours) < 3

    eight = problem()
    first = Evolution().begin(eight, 0)
    state, asked, states = run(Evolution(evaluations=600), eight, flat)
    assert len(asked) == 60
    assert {float(state["es"].std) for state in states} == {0.5}
    np.testing.assert_array_equal(state["es"].mean, first["es"].mean)
    np.testing.assert_allclose(state["es"].C, np.eye(8), atol=1e-5)
    assert (
        len({tuple(candidate) for candidates in asked for candidate in candidates}) == 600
    )  # it goes on looking around


def test_two_levels_of_fitness_do_not_collapse_the_search():
    """What is left of accuracy near its best: of ten candidates a few are worse, by chance."""

    def levels(population: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(population)) == np.argmax(population[:, 0]), 1.0, 0.0)

    assert min(sigmas(strict_ranks, levels)) > 0.05


def test_ties_get_the_weights_of_their_ranks_in_order_of_drawing():
    es = CMA_ES(population_size=6, solution=jnp.zeros(3))
    params = es.default_params
    shaped = strict_ranks(jnp.zeros((6, 3)), jnp.array([2.0, 1.0, jnp.nan, 1.0, 0.0, 1.0]), None, params)
    np.testing.assert_array_equal(shaped, params.weights[jnp.array([4, 1, 5, 2, 0, 3])])


@pytest.mark.parametrize("seed", range(3))
def test_a_quantised_objective_still_converges(seed):
    """Fitness in steps of a tenth, as of ten samples: nearly every generation has ties."""
    eight = problem()
    target = np.array([40, 240, 160, 120, 80, 60, 60, 40])
    smooth = towards(target)
    state, asked, _ = run(Evolution(evaluations=400), eight, lambda candidates: np.round(smooth(candidates), 1), seed)
    best, uniform = smooth(np.concatenate(asked)).max(), smooth(np.array([eight.space.uniform]))[0]
    assert uniform == pytest.approx(0.45)
    assert best > 0.8
    assert state["fitness"] >= 0.8
    mean, start = smooth(Evolution().proposals(eight, state))
    assert mean > 0.75  # the mean too
    assert start == uniform


def test_small_differences_between_large_fitnesses_count():
    """The tie-breaker may differ in the ninth digit, which float32 does not hold."""
    eight = problem()
    smooth = towards(np.array([40, 240, 160, 120, 80, 60, 60, 40]))
    exact = run(Evolution(evaluations=200), eight, smooth)
    tiny = run(Evolution(evaluations=200), eight, lambda candidates: 0.75 + 1e-9 * smooth(candidates))
    np.testing.assert_array_equal(np.concatenate(tiny[1]), np.concatenate(exact[1]))


def test_every_candidate_costs_the_total():
    twenty = problem(20)
    state, asked, states = run(Evolution(evaluations=60), twenty, towards(np.linspace(30, 170, 20)))
    for candidates, then in zip(asked, states, strict=True):
        twenty.space.check(candidates)
        twenty.space.check(Evolution().proposals(twenty, then))
    assert Evolution().spread(state) > 0


def groups_of(asked: list[np.ndarray], states: list[State]) -> dict[int, list[tuple[np.ndarray, State]]]:
    found: dict[int, list[tuple[np.ndarray, State]]] = {}
    for candidates, state in zip(asked, states, strict=True):
        found.setdefault(int(state["group"]), []).append((candidates, state))
    return found


def test_groups_of_eight_come_in_order_and_finished_ones_stay_at_their_best():
    twenty = problem(20)
    aim = towards(np.linspace(30, 170, 20))
    evolution = Evolution(evaluations=60)
    _, asked, states = run(evolution, twenty, aim)
    groups = groups_of(asked, states)
    assert list(groups) == [0, 1, 2]
    start, before = np.zeros(20, np.float32), -np.inf
    for number, layers in enumerate(twenty.space.groups):
        evaluated = np.concatenate([candidates for candidates, _ in groups[number]])
        points = np.concatenate([state["points"] for _, state in groups[number]])
        assert {len(candidates) for candidates, _ in groups[number]} == {4 + int(3 * np.log(len(layers)))}
        assert 60 <= len(evaluated) < 60 + len(groups[number][0][0])
        others = np.setdiff1d(np.arange(20), layers)
        np.testing.assert_array_equal(points[:, others], np.tile(start[others], (len(points), 1)))
        fitness = aim(evaluated)
        if fitness.max() > before:  # the best of all so far is never forgotten
            start, before = points[fitness.argmax()], fitness.max()
        last = groups[number][-1][1]
        np.testing.assert_array_equal(last["best"], start)
        assert last["fitness"] == before
    assert before > aim(np.array([twenty.space.uniform]))[0] + 0.1


def test_a_fresh_strategy_begins_each_group():
    twenty = problem(20)
    evolution = Evolution(evaluations=60)
    state, _, states = run(evolution, twenty, towards(np.linspace(30, 170, 20)))
    ends = [group[-1][1] for group in groups_of(states, states).values()]
    for number, ended in enumerate(ends[:-1], 1):
        _, entered = evolution.ask(twenty, ended)
        layers = twenty.space.groups[number]
        assert entered["group"] == number
        assert entered["es"].std == 0.5 != ended["es"].std
        np.testing.assert_array_equal(entered["es"].mean, ended["best"][layers.start : layers.stop])
    assert len(evolution.ask(twenty, state)[0]) == 0


def test_a_last_group_of_one_layer():
    nine = problem(9)
    target = np.array([90] * 8 + [180])
    state, asked, states = run(Evolution(evaluations=40), nine, towards(target), 1)
    alone = groups_of(asked, states)[1]
    assert {len(candidates) for candidates, _ in alone} == {4}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state["es"].mean, state["es"].C, state["es"].std)))
    nine.space.check(np.concatenate(asked))


@pytest.mark.parametrize("mode", ["project", "paper"])
def test_resuming_at_every_generation_changes_no_bit(mode):
    twelve = problem(12)
    aim = towards(np.linspace(30, 170, 12))
    evolution = Evolution(mode=mode, evaluations=40)
    whole = run(evolution, twelve, aim, 7)
    broken = run(evolution, twelve, aim, 7, through_numpy)
    np.testing.assert_array_equal(np.concatenate(broken[1]), np.concatenate(whole[1]))
    assert len(broken[2]) == len(whole[2])
    for one, other in zip([broken[0], *broken[2]], [whole[0], *whole[2]], strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for leaf, same in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.asarray(leaf).tobytes() == np.asarray(same).tobytes()
    another = run(evolution, twelve, aim, 8)
    assert (np.concatenate(another[1]) != np.concatenate(whole[1])).any()


def test_the_paper_searches_within_bounds_and_at_any_cost():
    space = problem(20, mean=100, floor=80, ceiling=120).space
    narrow = Problem(space, np.zeros(20))
    _, asked, states = run(Evolution(mode="paper", evaluations=60), narrow, lambda candidates: candidates.mean(axis=1))
    candidates = np.concatenate(asked)
    assert candidates.min() == 80
    assert candidates.max() == 120
    assert np.ptp(candidates.sum(axis=1)) > 0
    assert [float(group[0][1]["es"].mean.shape[0]) for group in groups_of(asked, states).values()] == [8, 8, 4]
    # the layers of a finished group are what its best candidate gave them, to the token
    best = candidates[candidates.mean(axis=1).argmax()]
    for number, layers in enumerate(space.groups[:-1]):
        later = np.concatenate([group for group, state in zip(asked, states, strict=True) if state["group"] > number])
        assert (later[:, layers.start : layers.stop] == best[layers.start : layers.stop]).all()
    first = Evolution(mode="paper").begin(narrow, 0)
    assert first["es"].std == np.float32(0.3)  # the paper's, of k/c from 1
    np.testing.assert_array_equal(first["es"].mean, np.ones(8))


def test_a_start_is_where_the_first_generation_lies():
    eight = problem(ceiling=1000)
    start = (0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0)
    candidates, _ = Evolution(start=start, sigma=1e-4).ask(eight, Evolution(start=start, sigma=1e-4).begin(eight, 0))
    wanted = eight.space.project(np.array([0.02, *start[1:]]))  # zero has no logarithm
    assert np.abs(candidates - np.array(wanted)).max() <= 1


@pytest.mark.parametrize("fields", [{"evaluations": 0}, {"sigma": -0.1}, {"population": 3}])
def test_settings_out_of_bounds_are_refused(fields):
    with pytest.raises(ValueError, match="must be positive"):
        Evolution(**fields)


@pytest.mark.parametrize("start", [(1.0,) * 7, (-1.0,) * 8])
def test_a_start_that_does_not_fit_is_refused(start):
    with pytest.raises(ValueError, match="give 8 shares"):
        Evolution(start=start).begin(problem(), 0)
