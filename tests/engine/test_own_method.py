"""A method of one file outside the library: a score that looks at values, an option of its own in budgets."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention.eviction import Eviction, PromptState
from kvjax.attention.methods import Demand, Method, MethodOption
from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.engine import Engine, EngineConfig
from kvjax.models import causal_attention
from tests.attention import rocketkv_oracle as oracle
from tests.engine import tiny
from tests.engine.client import GREEDY, generate, settle

WINDOW, BUDGET, HEADROOM, LENGTH, CONTEXT = 8, 40, 24, 300, 640


@dataclasses.dataclass(frozen=True)
class WeightedValues(Eviction):
    """The attention that a token receives, times the norm of its value: how much it adds to the outputs."""

    window: int = WINDOW
    power: float = 1.0

    def score(self, state: PromptState):
        return state.attention_received() * jnp.linalg.norm(state.v.astype(jnp.float32), axis=-1) ** self.power


@dataclasses.dataclass(frozen=True)
class ValueNorm(Method):
    def profile(self, demand: Demand) -> BudgetProfile:
        budget = LayerBudget.selecting(demand.token_budget + demand.headroom)
        return BudgetProfile.uniform(demand.windows, demand.context, budget)

    @property
    def eviction_options(self) -> tuple[MethodOption, ...]:
        return (MethodOption("value_power", float, 1.0, minimum=0, maximum=8),)

    def eviction(self, budget: LayerBudget) -> Eviction:
        return WeightedValues(power=float(dict(budget.eviction_options or ())["value_power"]))


def expected(prompt: list[int], power: float = 1.0) -> list[list[list[int]]]:
    """The positions that each kv head of each layer without a window retains, by NumPy.

    Args:
        power: of the norm of a value.
    """
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
            scores = (received * np.linalg.norm(v, axis=-1).T ** power)[:, : len(prompt) - WINDOW]
            best = [sorted(oracle.stable_top(row, BUDGET - WINDOW)) for row in scores]
            retained.append([[*row, *range(len(prompt) - WINDOW, len(prompt))] for row in best])
    return retained


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = EngineConfig(
        max_model_len=CONTEXT,
        max_num_seqs=2,
        method="tests.engine.test_own_method:ValueNorm",
        token_budget=BUDGET,
        headroom=HEADROOM,
    )
    with Engine.from_pretrained(tiny.write(tmp_path_factory.mktemp("own")), config) as engine:
        yield engine


def retained_positions(engine: Engine, prompt: list[int]) -> list[list[list[int]]]:
    """Of each kv head of each layer without a window."""
    [completion] = generate(engine, [(prompt, dataclasses.replace(GREEDY, max_tokens=4, retained=True))])
    assert len(completion.tokens) == 4
    assert completion.retained is not None
    return [
        [row[row >= 0].tolist() for row in positions]
        for positions, kind in zip(completion.retained, tiny.CONFIG.layers, strict=True)
        if kind.window is None
    ]


def test_a_view_retains_what_a_score_with_values_ranks_highest(engine):
    prompt = tiny.prompt(LENGTH)
    assert retained_positions(engine, prompt) == expected(prompt)
    settle(engine)


@pytest.fixture
def with_budgets(tmp_path):
    """Of eviction options the configuration of an engine with a file that sets them in all layers without a window."""

    def configured(**options: float | str) -> EngineConfig:
        like = LayerBudget.selecting(BUDGET + HEADROOM, **options)
        profile = BudgetProfile.uniform([kind.window for kind in tiny.CONFIG.layers], CONTEXT, like)
        profile.save(tmp_path / "profile.json", ModelFingerprint.of(tiny.CONFIG))
        return EngineConfig(
            max_model_len=CONTEXT,
            max_num_seqs=1,
            method="tests.engine.test_own_method:ValueNorm",
            budgets=str(tmp_path / "profile.json"),
            headroom=HEADROOM,
        )

    return configured


def test_an_option_of_its_own_in_a_file_of_budgets_is_followed(with_budgets, tmp_path):
    prompt = tiny.prompt(LENGTH)
    assert expected(prompt, 6) != expected(prompt)
    with Engine.from_pretrained(tiny.write(tmp_path / "model"), with_budgets(value_power=6)) as engine:
        assert retained_positions(engine, prompt) == expected(prompt, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_power": 9}, r"value_power=9.0 must be at most 8: 1.0 unless it is set"),
        ({"value_power": "9"}, r"value_power='9' is a str: give a float"),
        (
            {"value_pwer": 2},
            r"ValueNorm has no eviction option 'value_pwer' \(.*=2\): did you mean value_power\?",
        ),
        ({"sinks": 2}, r"ValueNorm has no eviction option 'sinks' \(sinks=2\): it knows value_power"),
    ],
)
def test_an_option_that_its_method_refuses_names_the_file_and_the_layer(with_budgets, options, message, tmp_path):
    with pytest.raises(ValueError, match=rf"profile\.json: layers\[\d\]: {message}"):
        Engine.from_pretrained(tiny.write(tmp_path / "model"), with_budgets(**options))


def test_an_output_longer_than_the_headroom_selects_again_by_the_same_rule(engine):
    [completion] = generate(engine, [(tiny.prompt(LENGTH), dataclasses.replace(GREEDY, max_tokens=2 * HEADROOM))])
    assert len(completion.tokens) == 2 * HEADROOM
    settle(engine)
