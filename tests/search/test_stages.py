"""Judging RocketKV's numbers: the engine with a profile of them generates what the evaluation calls right."""

import dataclasses

import numpy as np
import pytest

from kvjax import models
from kvjax.budget import BudgetProfile, LayerBudget, ModelFingerprint
from kvjax.engine import Engine, EngineConfig
from kvjax.models import LayerConfig, RopeConfig
from kvjax.search.evaluators.stages import StageEvaluator, StageReader
from kvjax.search.samples import RankedCase
from kvjax.search.spaces.rocketkv import Stages, split
from tests.engine import tiny
from tests.engine.client import GREEDY, generate

CONTEXT, ROOM = 640, 24
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    family="qwen3",
    layers=(LayerConfig(RopeConfig(16, 1e4)),) * 2,
    query_scale=0.25,
    activation="silu",
    post_norms=False,
    norm_plus_one=False,
    embed_scale=None,
)
STAGES = Stages(kernels=(1, 7), headroom=ROOM)
# kept, read, number of the kernel; of each of the two layers
SCHEMES = [((100, 24, 0), (60, 16, 1)), ((300, 64, 1), (40, 8, 0))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("staged"), CONFIG)
    return path, models.load(path)


@pytest.mark.parametrize("candidate", SCHEMES, ids=str)
def test_the_engine_generates_what_the_evaluation_calls_right(model, candidate, tmp_path):
    path, decoder = model
    layers = tuple(
        LayerBudget.selecting(
            retained + ROOM,
            observation_window=STAGES.window,
            pooling_kernel=STAGES.kernels[kernel],
            selected_tokens=read,
            page_size=STAGES.page_size,
            sinks=STAGES.sinks,
        )
        for retained, read, kernel in candidate
    )
    BudgetProfile(layers).save(tmp_path / "profile.json", ModelFingerprint.of(decoder.config))
    config = EngineConfig(
        max_model_len=CONTEXT, max_num_seqs=1, budgets=str(tmp_path / "profile.json"), headroom=ROOM, reselect=False
    )
    rng = np.random.default_rng(3)
    cases = []
    with Engine.from_pretrained(path, config) as engine:
        for length, asked in ((30, 0), (200, 0), (600, 5)):
            prompt = rng.integers(5, 250, length).tolist()
            params = dataclasses.replace(GREEDY, max_tokens=10, compress_after=length - asked if asked else None)
            [completion] = generate(engine, [(prompt, params)])
            tail = (*prompt[length - asked :], *completion.tokens)
            cases.append(RankedCase(tuple(prompt[: length - asked]), tail, len(completion.tokens)))
    evaluator = StageEvaluator(decoder, STAGES, batch=2)
    blocks = evaluator.place(StageReader(decoder, STAGES).read(cases, 600, 16))
    other = tuple((retained, 8, kernel) for retained, _, kernel in candidate)
    scores = evaluator.evaluate(np.array([candidate, other]), blocks, len(cases))
    np.testing.assert_array_equal(scores.exact[0], 1)
    assert scores.exact[1].min() == 0  # reading fewer tokens is told apart


def test_a_split_stays_within_its_traffic():
    for traffic in (16, 40, 100, 300):
        for exponent in (0.0, 0.3, 0.7, 1.0):
            retained, read = split(4096, traffic, exponent, dataclasses.replace(STAGES, headroom=8, window=4, sinks=0))
            pages = -(-(retained + 8) // STAGES.page_size)
            assert read + -(-pages // 2) <= traffic
            assert read >= 2 * STAGES.page_size
            assert retained >= 4
    with pytest.raises(ValueError, match="pays for fewer than two pages"):
        split(4096, 8, 0.5, STAGES)
