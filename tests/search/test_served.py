"""What was searched is what is served: the engine with a profile says what the masked evaluation says."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from kvjax import models
from kvjax.attention.eviction import Observation
from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.engine import Engine, EngineConfig
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedReader
from kvjax.search.samples import RankedCase
from tests.engine import tiny
from tests.engine.client import GREEDY, generate

WINDOW, KERNEL, SINKS, ROOM = 8, 7, 4, 24
WINDOWS, CONTEXT = [100, None, None], 640
SCHEMES = [(12, 12), (20, 90), ((560, 33), (12, 60))]  # the last says what each of two kv heads keeps


def profile(candidate) -> BudgetProfile:
    budgets = [
        LayerBudget.selecting(
            max(np.atleast_1d(retained).tolist()) + ROOM,
            observation_window=WINDOW,
            pooling_kernel=KERNEL,
            sinks=SINKS,
            head_tokens=retained if isinstance(retained, tuple) else None,
        )
        for retained in candidate
    ]
    return BudgetProfile((LayerBudget(100), *budgets))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("searched"))
    return path, models.load(path)


@pytest.fixture(scope="module", params=SCHEMES, ids=str)
def served(request, model, tmp_path_factory):
    """The candidate, and the engine that serves it."""
    path, decoder = model
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    profile(request.param).save(file, ModelFingerprint.of(decoder.config))
    config = EngineConfig(
        max_model_len=CONTEXT,
        max_num_seqs=2,
        budgets=str(file),
        method="rocketkv-stage1",
        headroom=ROOM,
        reselect=False,
    )
    with Engine.from_pretrained(path, config) as engine:
        yield request.param, engine


@pytest.mark.parametrize("asked", [0, 5], ids=["question in the prompt", "question behind it"])
def test_the_engine_generates_what_the_evaluation_calls_right(model, served, asked):
    _, decoder = model
    candidate, engine = served
    rng = np.random.default_rng(3)
    cases = []
    for length in (40, 200, 557):
        prompt = rng.integers(5, 250, length).tolist()
        params = dataclasses.replace(GREEDY, max_tokens=12, compress_after=length - asked if asked else None)
        [completion] = generate(engine, [(prompt, params)])
        tail = (*prompt[length - asked :], *completion.tokens)
        cases.append(RankedCase(tuple(prompt[: length - asked]), tail, len(completion.tokens)))
    evaluator = PopulationEvaluator(decoder, batch=4, devices=jax.devices()[:1])
    blocks = evaluator.place(RankedReader(decoder, Observation(WINDOW, KERNEL, SINKS), 560).read(cases, 560))
    scores = evaluator.evaluate(np.array([candidate]), blocks, len(cases))
    np.testing.assert_array_equal(scores.exact, 1)
    wrong = [dataclasses.replace(case, tail=(*case.tail[:-1], case.tail[-1] ^ 1)) for case in cases]
    blocks = evaluator.place(RankedReader(decoder, Observation(WINDOW, KERNEL, SINKS), 560).read(wrong, 560))
    np.testing.assert_array_equal(evaluator.evaluate(np.array([candidate]), blocks, len(cases)).exact, 0)


def test_memory_falls_as_the_profile_says(model, served):
    """Bytes of K and V on the device, counted from the arrays that are there."""
    _, decoder = model
    candidate, engine = served
    held = engine.view_bytes
    entries = 100 + sum(min(max(np.atleast_1d(retained).tolist()) + ROOM, CONTEXT) for retained in candidate)
    config = decoder.config
    assert held == 2 * entries * config.num_kv_heads * config.head_dim * 4 * engine.layout.max_num_seqs
    if candidate == (12, 12):
        full = 2 * (100 + 2 * CONTEXT) * config.num_kv_heads * config.head_dim * 4 * engine.layout.max_num_seqs
        assert math.ceil(full / held) == 9  # 1,380 entries, and 172


def test_a_profile_found_for_other_weights_is_refused(model, tmp_path):
    path, decoder = model
    file = tmp_path / "profile.json"
    profile(SCHEMES[0]).save(file, ModelFingerprint.of(decoder.config, "a" * 64))
    config = EngineConfig(max_model_len=CONTEXT, budgets=str(file), method="rocketkv-stage1", headroom=ROOM)
    with pytest.raises(ValueError, match=r"they differ in weights; use a profile made for this model"):
        Engine.from_pretrained(path, config).start()
