"""Budgets and layers for property tests of `kvjax.budget`."""

import dataclasses

import hypothesis.strategies as st

from kvjax.budget import LayerBudget

# the sliding window of each layer; some slide
WINDOWS = st.lists(st.one_of(st.none(), st.integers(1, 5000)), min_size=1, max_size=40)


@st.composite
def layer_budgets(draw: st.DrawFn) -> LayerBudget:
    """Any valid budget: with and without either stage."""
    budget = LayerBudget(draw(st.integers(1, 4096)))
    if draw(st.booleans()):
        window = draw(st.integers(1, budget.capacity))
        kernel = 2 * draw(st.integers(0, 40)) + 1
        budget = dataclasses.replace(budget, observation_window=window, pooling_kernel=kernel)
    if budget.capacity > 1 and draw(st.booleans()):
        budget = dataclasses.replace(
            budget,
            stage2_tokens=draw(st.integers(1, budget.capacity - 1)),
            page_size=draw(st.integers(1, min(16, budget.capacity))),
            head_dims=draw(st.one_of(st.none(), st.integers(1, 128))),
        )
    return budget


@st.composite
def selecting_budgets(draw: st.DrawFn) -> LayerBudget:
    """A budget whose stage 1 chooses, so that it may keep less than the context."""
    budget = draw(layer_budgets())
    if budget.observation_window is None:
        window = draw(st.integers(1, min(64, budget.capacity)))
        budget = dataclasses.replace(budget, observation_window=window, pooling_kernel=63)
    return budget
