"""Budgets and layers for property tests of `kvjax.budget`."""

import dataclasses

import hypothesis.strategies as st

from kvjax.budget import LayerBudget, sorted_options

# the sliding window of each layer; some slide
WINDOWS = st.lists(st.one_of(st.none(), st.integers(1, 5000)), min_size=1, max_size=40)
# options of methods that the library does not know
OPTIONS = st.dictionaries(
    st.text(), st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), max_size=3
)


@st.composite
def layer_budgets(draw: st.DrawFn) -> LayerBudget:
    """Any valid budget: with and without either stage, with options of the library's methods or of any other."""
    budget = LayerBudget(draw(st.integers(1, 4096)))
    if draw(st.booleans()):
        options = draw(OPTIONS | st.builds(_observation, st.integers(1, budget.capacity), st.integers(0, 40)))
        budget = dataclasses.replace(budget, eviction_options=sorted_options(options))
    if budget.capacity > 1 and draw(st.booleans()):
        budget = dataclasses.replace(
            budget,
            selected_tokens=draw(st.integers(1, budget.capacity - 1)),
            page_size=draw(st.integers(1, min(16, budget.capacity))),
            selection_options=sorted_options(draw(OPTIONS | st.fixed_dictionaries({"head_dims": st.integers(1, 128)}))),
        )
    return budget


@st.composite
def selecting_budgets(draw: st.DrawFn) -> LayerBudget:
    """A budget that evicts, so that it may keep less than the context."""
    budget = draw(layer_budgets())
    window = draw(st.integers(1, min(64, budget.capacity)))
    return dataclasses.replace(budget, eviction_options=sorted_options(_observation(window, 31)))


def window_of(budget: LayerBudget) -> int:
    """The last prompt positions that always stay."""
    return int(dict(budget.eviction_options or ())["observation_window"])


def _observation(window: int, half: int) -> dict[str, int]:
    return {"observation_window": window, "pooling_kernel": 2 * half + 1}
