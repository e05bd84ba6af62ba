"""A method defined outside the library, whose score looks at values, served by an engine by the path of its class."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.eviction import Eviction, PromptState
from kvjax.attention.methods import Demand, Method
from kvjax.budget import BudgetProfile, LayerBudget
from kvjax.engine import Engine, EngineConfig
from kvjax.models import causal_attention
from tests.attention import rocketkv_oracle as oracle
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle

WINDOW, BUDGET, HEADROOM, LENGTH = 8, 40, 24, 300


@dataclasses.dataclass(frozen=True)
class WeightedValues(Eviction):
    """The attention that a token receives, times the norm of its value: how much it adds to the outputs."""

    window: int = WINDOW

    def score(self, state: PromptState):
        return state.attention_received() * jnp.linalg.norm(state.v.astype(jnp.float32), axis=-1)


@dataclasses.dataclass(frozen=True)
class ValueNorm(Method):
    def profile(self, demand: Demand) -> BudgetProfile:
        budget = LayerBudget.selecting(demand.token_budget + demand.headroom, observation_window=WINDOW)
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    def eviction(self, budget: LayerBudget) -> Eviction:
        return WeightedValues()


def expected(prompt: list[int]) -> list[list[list[int]]]:
    """The positions that each kv head of each layer without a window retains, by NumPy."""
    decoder, config = tiny.decoder(), tiny.CONFIG
    x, positions, retained = decoder.embed(jnp.asarray([prompt])), jnp.arange(len(prompt))[None], []
    for layer, kind in zip(decoder.layers, config.layers, strict=True):
        seen: list[np.ndarray] = []
        dense = causal_attention(config, kind)

        def attend(q, k, v, seen=seen, dense=dense):
            seen.extend(np.asarray(x)[0] for x in (q, k, v))
            return dense(q, k, v)

        x = layer(x, positions, attend)
        q, k, v = seen
        if kind.window is None:
            queries, keys = q[-WINDOW:], k.transpose(1, 0, 2)
            received = oracle.received(queries, keys, len(prompt), WINDOW, config.query_scale)
            received = received.reshape(len(keys), -1, len(prompt)).sum(axis=1)
            scores = (received * np.linalg.norm(v, axis=-1).T)[:, : len(prompt) - WINDOW]
            best = [sorted(oracle.stable_top(row, BUDGET - WINDOW)) for row in scores]
            retained.append([[*row, *range(len(prompt) - WINDOW, len(prompt))] for row in best])
    return retained


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = EngineConfig(
        max_model_len=640,
        max_num_seqs=2,
        method="tests.engine.test_own_method:ValueNorm",
        token_budget=BUDGET,
        headroom=HEADROOM,
    )
    with Engine.from_pretrained(tiny.write(tmp_path_factory.mktemp("own")), config) as engine:
        yield engine


def test_a_view_retains_what_a_score_with_values_ranks_highest(engine):
    prompt = tiny.prompt(LENGTH)
    [completion] = generate(engine, [(prompt, dataclasses.replace(GREEDY, max_tokens=4, retained=True))])
    assert len(completion.tokens) == 4
    assert completion.retained is not None
    retained = [
        [row[row >= 0].tolist() for row in positions]
        for positions, kind in zip(completion.retained, tiny.CONFIG.layers, strict=True)
        if kind.window is None
    ]
    assert retained == expected(prompt)
    settle(engine)


def test_an_output_longer_than_the_headroom_selects_again_by_the_same_rule(engine):
    [completion] = generate(engine, [(tiny.prompt(LENGTH), dataclasses.replace(GREEDY, max_tokens=2 * HEADROOM))])
    assert len(completion.tokens) == 2 * HEADROOM
    settle(engine)
