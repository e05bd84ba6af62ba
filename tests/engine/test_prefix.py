"""KV from the store: a prompt computes what is new, and is answered to the bit as if it had computed everything."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig
from kvjax.store.config import StoreConfig
from kvjax.store.planner import Planner
from tests.engine import tiny
from tests.engine.client import GREEDY, Client, settle
from tests.store.chains import forget_host
from tests.store.memory_tier import MemoryTier

CHUNK = 256
BLOCK_BYTES = CHUNK * 3 * 2 * 2 * 16 * 4  # layers, kv heads, K and V, head dim, bytes
PARAMS = dataclasses.replace(GREEDY, max_tokens=40, logprobs=3, retained=True)


def engine_of(folder: Path, store: StoreConfig | None, method: str | None = None, **settings) -> Engine:
    budget = None if method in (None, "full") else 192
    config = EngineConfig(
        max_model_len=900,
        max_num_seqs=2,
        method=method,
        token_budget=budget,
        headroom=32,
        prefill_chunk_size=CHUNK,
        store=store,
        **settings,
    )
    return Engine.from_pretrained(folder, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(scope="module", params=["rocketkv-mt", "full"])
def engine(folder, request):
    with engine_of(folder, StoreConfig(host_cache_size=1 << 24), request.param) as engine:
        yield engine
        assert engine.stats().compiles_after_warmup == 0


def equal(cold, warm) -> None:
    assert (cold.tokens, cold.logprobs) == (warm.tokens, warm.logprobs)
    for ours, theirs in zip(cold.retained, warm.retained, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def ask(engine, prompt, salt=""):
    """The answer, once all that it leaves in the store is there."""
    with Client() as client:
        answer = client.submit(engine, prompt, PARAMS, cache_salt=salt).result()
    settle(engine)
    return answer


@pytest.mark.parametrize(
    ("first", "second", "reused"),
    [
        (600, 800, 2),
        (512, 700, 2),
        (511, 700, 1),
        (513, 513, 1),
        (512, 512, 1),
        (768, 769, 2),
        (700, 640, 2),
        (700, 639, 1),
        (100, 300, 0),
        (255, 600, 0),
    ],
)
def test_a_prompt_that_begins_as_an_earlier_one(engine, first, second, reused):
    """The last 128 tokens, whose queries choose, are always computed: 640 tokens reuse 512, and 639 only 256.

    Where nothing is chosen it is the last token alone.
    """
    if not engine.caches.window:
        reused = min(first, second - 1) // CHUNK
    earlier = tiny.prompt(800)[:first]
    turn = [*earlier[:second], *tiny.prompt(800, seed=1)[: max(second - first, 0)]]
    salt = f"{first} {second}"
    cold = ask(engine, turn, "cold " + salt)
    ask(engine, earlier, salt)
    warm = ask(engine, turn, salt)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, reused * CHUNK)
    equal(cold, warm)


def test_log_probabilities_of_a_prompt_are_computed_although_its_kv_is_there(engine):
    params = dataclasses.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    prompt = tiny.prompt(600)
    [first] = engine.generate([prompt], params, progress=False)
    settle(engine)
    [again] = engine.generate([prompt], params, progress=False)
    assert again.cached_tokens == 0
    assert first.prompt_logprobs == again.prompt_logprobs


def test_a_prompt_that_leaves_halfway_leaves_nothing_leased(engine):
    with Client() as client:
        for _ in range(3):
            running = client.submit(engine, tiny.prompt(800, seed=7), PARAMS, cache_salt="leaves")
            running.disconnect()
            running.wait()
    settle(engine)
    assert ask(engine, tiny.prompt(800, seed=7), "leaves").finish is not None


def test_many_at_once_with_a_common_beginning(engine):
    common = tiny.prompt(600, seed=3)
    prompts = [[*common, *tiny.prompt(100, seed=seed)] for seed in range(6)]
    cold = [ask(engine, prompt, f"alone {number}") for number, prompt in enumerate(prompts)]
    with Client() as client:
        running = [client.submit(engine, prompt, PARAMS, cache_salt="together") for prompt in prompts]
        warm = [each.result() for each in running]
    for ours, theirs in zip(cold, warm, strict=True):
        equal(ours, theirs)
    settle(engine)


def test_a_canary_finds_what_is_not_what_would_be_computed(folder, caplog):
    prompt = tiny.prompt(700, seed=9)
    with engine_of(folder, StoreConfig(host_cache_size=1 << 24, verify_hits=1.0)) as engine:
        cold = ask(engine, prompt)
        again = ask(engine, prompt)
        assert again.cached_tokens == 0
        equal(cold, again)
        stats = engine.store_stats()["host"]
        assert (stats.checked, stats.errors) == (3 * 3, {}), "two blocks and the tail, of three layers"
        store = engine._prefix.store
        [first, *_] = engine._prefix.keys(np.asarray(prompt), "")
        store._host.find(first.hex).blob[-1] ^= 1
        assert ask(engine, prompt).tokens == cold.tokens
        assert engine.store_stats()["host"].errors == {"verify": 1}
    assert "is not what is computed now" in caplog.text


class SlowTier(MemoryTier):
    """A remote tier that takes its time."""

    name = "remote"
    seconds = 0.0

    def read(self, key: str, into: memoryview) -> bool:
        time.sleep(self.seconds)
        return super().read(key, into)


class Everything(Planner):
    """Loads whatever there is, however long it takes."""

    def choose(self, tiers, first=0):
        return len(tiers)

    def compute_seconds(self, index, blocks=1):
        return None  # so nothing bounds the wait for a tier but the policy


def behind(engine, seconds: float) -> SlowTier:
    """Everything that the host tier holds moves behind a tier that takes so many seconds for each block."""
    store, far = engine._prefix.store, SlowTier()
    for buffer in store._host.ready():
        far.write(buffer.key, memoryview(buffer.blob), buffer.parent)
    forget_host(store)
    store.replace_tiers((far,))
    far.seconds = seconds
    return far


@pytest.mark.parametrize(("policy", "found"), [("best_effort", 0), ("timeout", 0), ("wait_complete", 768)])
def test_a_request_waits_for_stored_kv_as_the_policy_says_and_others_overtake_it(folder, policy, found):
    config = StoreConfig(
        host_cache_size=1 << 24,
        prefetch_policy=policy,
        prefetch_base=0.3,
        prefetch_per_1k=0.0,
        write_policy="write_back",
    )
    stored, new = tiny.prompt(850, seed=11), tiny.prompt(300, seed=12)
    with engine_of(folder, config) as engine:
        cold = ask(engine, stored)
        behind(engine, seconds=1.0)
        engine._prefix.store.planner = Everything()
        with Client() as client:
            began = time.monotonic()
            first = client.submit(engine, stored, PARAMS)
            second = client.submit(engine, new, PARAMS)
            second.wait_for(1)
            overtaken = not first.deltas
            warm = first.result()
            seconds = time.monotonic() - began
            second.result()
        settle(engine)
        equal(cold, warm)
        assert warm.cached_tokens == found
        assert overtaken == (policy != "best_effort")
        assert seconds >= {"best_effort": 0.0, "timeout": 0.3, "wait_complete": 1.0}[policy]


def test_a_request_that_leaves_while_its_kv_is_on_the_way_holds_nothing(folder):
    config = StoreConfig(host_cache_size=1 << 24, prefetch_policy="wait_complete")
    prompt = tiny.prompt(850, seed=11)
    with engine_of(folder, config) as engine:
        ask(engine, prompt)
        behind(engine, seconds=0.5)
        with Client() as client:
            waiting = client.submit(engine, prompt, PARAMS)
            time.sleep(0.1)
            waiting.disconnect()
            waiting.wait()
        settle(engine)


def test_a_store_that_holds_no_chunk_is_refused(folder):
    engine_of(folder, StoreConfig(host_cache_size=BLOCK_BYTES))
    with pytest.raises(
        ValueError,
        match=f"={BLOCK_BYTES - 1} hold no chunk of 256 tokens, which takes {BLOCK_BYTES}: raise --host",
    ):
        engine_of(folder, StoreConfig(host_cache_size=BLOCK_BYTES - 1))
