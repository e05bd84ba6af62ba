"""A population of candidates is evaluated on all devices at once, and scored as on one."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from kvjax.attention.eviction import Observation
from kvjax.engine.device.compiles import CompileCounter
from kvjax.search.config import SearchConfig
from kvjax.search.evaluators import evaluator, population
from kvjax.search.evaluators.population import PopulationEvaluator
from kvjax.search.evaluators.ranking import RankedReader
from kvjax.search.run import search
from tests.search.copying import MODEL, WINDOW, case, sets

SAMPLES = 11  # the last block of samples is filled up


def candidates(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(WINDOW, 96, (count, 2))


def test_a_population_lies_on_all_devices_and_scores_as_on_one(devices):
    model = MODEL.build()
    prompts = RankedReader(model, Observation(WINDOW, 1), 96).read([case(seed) for seed in range(SAMPLES)])
    many = PopulationEvaluator(model, batch=10, devices=devices)
    one = PopulationEvaluator(model, batch=16, devices=devices[:1])
    blocks = many.place(prompts)
    for count in (1, 16, 21):  # fewer than devices, as many as a batch holds, more
        found = many.evaluate(candidates(count), blocks, SAMPLES)
        expected = one.evaluate(candidates(count), one.place(prompts), SAMPLES)
        np.testing.assert_array_equal(found.exact, expected.exact)
        np.testing.assert_allclose(found.log_probability, expected.log_probability, rtol=1e-5, atol=1e-6)
    budgets = jax.device_put(np.full((16, 2, 2), 40, np.int32), many._split)
    exact, *_ = population._evaluate(many._graph, many._params, blocks[0], budgets)
    assert exact.sharding.device_set == set(devices)
    assert {shard.data.shape for shard in exact.addressable_shards} == {(2, evaluator.BLOCK)}


def test_a_search_over_devices_compiles_once_and_finds_the_best(devices):
    config = SearchConfig(
        model=Path("hand-set"), tasks=("copying",), token_budget=40, length=96, evaluations=48, batch=8,
        allocator="evolution", window=WINDOW, sinks=0,
    )  # fmt: skip
    model = MODEL.build()
    first = search(config, model=model, sets=sets(16), progress=False)
    assert first.outcome("evolution").candidate is not None
    assert (first.outcome("evolution").candidate or ())[0] <= WINDOW + 2
    counter = CompileCounter()
    counter.start()
    try:
        search(dataclasses.replace(config, seed=1), model=model, sets=sets(16), progress=False)
        assert counter.count == 0
    finally:
        counter.stop()
