"""Small steps: stored prefixes are used to 64 tokens, and what is computed behind them has the bits of a whole prompt.

On `kvjax_small`, whose products give a row the same bits in chunks of 64 and of 512; those of the tiny model do not.
"""

import pathlib
import time

import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig, SamplingParams
from kvjax.engine.device.prefill import schedule
from kvjax.store.config import StoreConfig
from tests.engine.client import Client, settle
from tests.engine.test_prefix import equal

MODEL = pathlib.Path(__file__).parents[2] / "models" / "kvjax_small"
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3, retained=True)
WINDOW = 1  # the last token is always computed


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(
        max_num_seqs=2, max_model_len=2048, max_num_queued_reqs=40, store=StoreConfig(host_cache_size=1 << 27)
    )
    with Engine.from_pretrained(MODEL, config) as engine:
        yield engine


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 2000, length).tolist()


def ask(engine: Engine, tokens: list[int], salt: str):
    with Client() as client:
        answer = client.submit(engine, tokens, PARAMS, cache_salt=salt).result()
    settle(engine)
    return answer


def test_sizes_agree_on_this_machine(engine):
    assert engine._parts.runner.sizes == (64, 512)


@pytest.mark.parametrize("length", [300, 511, 512, 513, 1000, 1300, 1536])
def test_an_equal_prompt_computes_its_last_tokens_and_answers_to_the_bit(engine, length):
    tokens = prompt(length, seed=length)
    cold, warm = ask(engine, tokens, "equal"), ask(engine, tokens, "equal")
    assert cold.cached_tokens == 0
    assert warm.cached_tokens == (length - WINDOW) // 64 * 64
    equal(cold, warm)


@pytest.mark.parametrize(("common", "found"), [(255, 0), (256, 256), (700, 512), (768, 768), (1290, 1280)])
def test_every_block_is_found_and_the_rest_computed_to_the_bit(engine, common, found):
    salt = f"common {common}"
    first = prompt(common, seed=1) + prompt(400, seed=2)
    second = prompt(common, seed=1) + prompt(333, seed=3)
    ask(engine, first, salt)
    warm, cold = ask(engine, second, salt), ask(engine, second, f"{salt} cold")
    assert (cold.cached_tokens, warm.cached_tokens) == (0, found)
    equal(cold, warm)


def test_a_short_prompt_is_not_stored(engine):
    tokens = prompt(100, seed=5)
    assert [ask(engine, tokens, "short").cached_tokens for _ in range(2)] == [0, 0]


def test_equal_prompts_at_once_are_computed_once(engine):
    tokens = prompt(1300, seed=6)
    with Client() as client:
        running = [client.submit(engine, tokens, PARAMS, cache_salt="at once") for _ in range(8)]
        answers = [each.result() for each in running]
    settle(engine)
    assert sorted(answer.cached_tokens for answer in answers) == [0] + [1280] * 7
    for answer in answers[1:]:
        equal(answers[0], answer)


def test_a_common_beginning_is_computed_once(engine):
    common = prompt(1024, seed=7)
    with Client() as client:
        running = [
            client.submit(engine, common + prompt(150, seed=seed), PARAMS, cache_salt="common")
            for seed in range(50, 82)
        ]
        answers = [each.result() for each in running]
    settle(engine)
    assert sorted(answer.cached_tokens for answer in answers) == [0] + [1024] * 31


def test_a_cancelled_prompt_leaves_what_it_had(engine):
    """Blocks are found as each is done in all layers: the first of a long prompt while the last group is under way."""
    tokens = prompt(1536, seed=8)
    with Client() as client:
        leaving = client.submit(engine, tokens, PARAMS, cache_salt="left")
        store = engine._prefix.store
        keys = [key.hex for key in engine._prefix.keys(np.asarray(tokens), "left")]
        end = time.monotonic() + 60
        while not leaving.deltas and store._host.find(keys[0]) is None and time.monotonic() < end:
            time.sleep(0.001)
        leaving.disconnect()
        leaving.wait()
        settle(engine)
        stored = next((i for i, key in enumerate(keys) if store._host.find(key) is None), len(keys))
    assert stored >= 1
    assert ask(engine, tokens, "left").cached_tokens >= 256 * min(stored, 5)


@pytest.mark.parametrize("start", [0, 64, 256, 576])
@pytest.mark.parametrize("end", [577, 640, 700, 1024, 1500, 2048])
@pytest.mark.parametrize("sizes", [(64, 512), (64, 256, 2048), (512,), (256,)])
def test_units_cover_the_rest_once_and_stay_in_the_workspace(start, end, sizes):
    start -= start % sizes[0]
    bucket = -(-end // sizes[-1]) * sizes[-1]
    units = schedule(start, end, sizes, bucket)
    places = [place for first, size in units for place in range(first, first + size)]
    assert places[: end - start] == list(range(start, end))
    assert all(size in sizes and first + size <= bucket for first, size in units)
    assert len(places) - (end - start) < max(sizes[0], sizes[-1] // 2 + 1)
