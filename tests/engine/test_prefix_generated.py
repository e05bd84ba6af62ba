"""Generated tokens in the store: a conversation's next turn begins behind the answer, from the very bits of decode."""

import contextlib
import dataclasses
import itertools
import threading

import numpy as np
import pytest

from kvjax.engine import Engine
from kvjax.engine.kv.block_assembler import BlockAssembler
from kvjax.store.config import StoreConfig
from kvjax.store.keys import BLOCK_TOKENS
from tests.engine import tiny
from tests.engine.client import GREEDY, Client, settle
from tests.engine.test_prefix import behind, engine_of, equal

STORE = StoreConfig(host_cache_size=1 << 25, store_generated=True, prefetch_policy="wait_complete")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("generated"))


METHODS = ("full", "rocketkv", "rocketkv-mt")


@pytest.fixture(scope="module")
def engines(folder):
    """One of each method. All compile before any of them serves: who compiles is not told apart."""
    with contextlib.ExitStack() as stack:
        started = {method: stack.enter_context(engine_of(folder, STORE, method)) for method in METHODS}
        before = {method: engine.stats().compiles_after_warmup for method, engine in started.items()}
        yield started
        assert {method: engine.stats().compiles_after_warmup for method, engine in started.items()} == before


@pytest.fixture(params=METHODS)
def engine(engines, request):
    return engines[request.param]


@pytest.fixture
def full(engines):
    return engines["full"]


def ask(engine: Engine, prompt, count: int, salt: str = "", **params):
    """The answer, once all that it leaves in the store is there."""
    params = dataclasses.replace(GREEDY, max_tokens=count, **params)
    with Client() as client:
        answer = client.submit(engine, prompt, params, cache_salt=salt).result()
    settle(engine)
    return answer


def following(prompt, answer, more: int = 150) -> list[int]:
    """The prompt of the next turn."""
    return [*prompt, *answer.tokens, *tiny.prompt(more, seed=77)]


def stored(engine: Engine, tokens, salt: str, fork: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """K and V [K, 256, D] of each block and layer that the host tier has of a sequence; block `fork` is generated."""
    prefix, store = engine._prefix, engine._prefix.store
    blocks = []
    for name in prefix.keys(np.asarray(tokens), salt, engine.caches.decoding, fork):
        buffer = store._host.find(name.hex)
        if buffer is None:
            break
        store.layout.check(buffer.blob, name)
        blocks.append([store.layout.tensors(buffer.blob, layer) for layer in range(store.layout.layers)])
    return blocks


class Watch:
    """Every token's K and V as a decode step left them in the views of slot 0: {(layer, head, position): bytes}."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self.seen: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}
        self._runner = engine._runner
        for name in ("decode", "_extend"):
            monkeypatch.setattr(self._runner, name, self._after(getattr(self._runner, name)))

    def _after(self, step):
        def watched(*args):
            out = step(*args)
            for layer, view in enumerate(self._runner.views):
                k, v, positions = (np.asarray(x)[0] for x in (view.k, view.v, view.positions))
                for head, place in np.argwhere(positions >= 0).tolist():
                    key = layer, head, int(positions[head, place])
                    here = k[head, place].tobytes(), v[head, place].tobytes()
                    assert self.seen.setdefault(key, here) == here
            return out

        return watched


def test_the_next_turn_finds_the_answer_and_its_bits_are_those_of_decode(engine, monkeypatch):
    """Tokens 300 to 511 were decoded, the tail of the prompt (256 to 299) was read; both are in one chunk."""
    prompt, salt = tiny.prompt(300, seed=1), "bits"
    with monkeypatch.context() as patch:
        watch = Watch(engine, patch)
        first = ask(engine, prompt, 250, salt)
    blocks = stored(engine, [*prompt, *first.tokens], salt, fork=1)
    assert len(blocks) == 2
    for layer, (k, v) in enumerate(blocks[1]):
        for head in range(2):
            for position in range(300, 512):
                here = k[head, position - 256].tobytes(), v[head, position - 256].tobytes()
                assert watch.seen[layer, head, position] == here, (layer, head, position)
    again = ask(engine, following(prompt, first), 5, salt)
    assert (first.cached_tokens, again.cached_tokens) == (0, 512)


def test_the_tail_of_the_prompt_is_that_of_dense_prefill(full):
    prompt, salt = tiny.prompt(300, seed=1), "tail"
    first = ask(full, prompt, 250, salt)
    [_, generated] = stored(full, [*prompt, *first.tokens], salt, fork=1)
    ask(full, [*prompt, *tiny.prompt(300)], 1, "dense")
    dense = stored(full, [*prompt, *tiny.prompt(300)], "dense", fork=2)
    for (k, v), (dense_k, dense_v) in zip(generated, dense[1], strict=True):
        np.testing.assert_array_equal(k[:, :44], dense_k[:, :44])
        np.testing.assert_array_equal(v[:, :44], dense_v[:, :44])


def test_with_the_full_cache_the_next_turn_goes_on_as_the_answer_would_have(full):
    prompt = tiny.prompt(300, seed=2)
    whole = ask(full, prompt, 300, "whole", logprobs=0)
    first = ask(full, prompt, 250, "parts")
    assert first.tokens == whole.tokens[:250]
    again = ask(full, [*prompt, *first.tokens], 50, "parts", logprobs=0)
    assert again.cached_tokens == 512
    assert again.tokens == whole.tokens[250:]
    expected = [logprob.logprob for logprob in whole.logprobs[250:]]
    np.testing.assert_allclose([logprob.logprob for logprob in again.logprobs], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("length", "count", "found"),
    [
        (300, 212, 256),
        (300, 213, 512),
        (300, 214, 512),
        (256, 257, 512),
        (255, 258, 512),
        (257, 255, 256),
        (100, 156, 0),
        (100, 157, 256),
    ],
)
def test_a_chunk_is_stored_once_every_token_of_it_has_kv(full, length, count, found):
    """The last token of an answer has none: 300 tokens and 213 more are 512 with KV."""
    prompt, salt = tiny.prompt(length, seed=3), f"{length} {count}"
    first = ask(full, prompt, count, salt)
    assert ask(full, following(prompt, first, 256), 1, salt).cached_tokens == found


def test_three_turns(engine):
    """What later turns compute behind generated chunks is found behind them, and is never taken for dense prefill."""
    salt, prompt, found = "three turns", tiny.prompt(100, seed=4), []
    for count in (300, 120, 1):
        answer = ask(engine, prompt, count, salt)
        found.append(answer.cached_tokens)
        prompt = following(prompt, answer, 100)
    assert found == [0, 256, 512]
    assert not stored(engine, prompt, salt, fork=len(prompt) // BLOCK_TOKENS), "as dense prefill"


def test_dense_chunks_are_found_first_and_are_those_of_an_engine_without(engine, folder):
    """The same prompt, computed without the generated chunks: from then on all of it is dense."""
    salt, prompt = "dense first", tiny.prompt(300, seed=5)
    first = ask(engine, prompt, 250, salt)
    turn = following(prompt, first)
    params = {"prompt_logprobs": 0}  # which need every token to be computed
    assert ask(engine, turn, 1, salt, **params).cached_tokens == 0
    assert stored(engine, turn, salt, fork=2)
    warm, cold = (ask(engine, turn, 20, each, retained=True, logprobs=1) for each in (salt, "cold " + salt))
    assert warm.cached_tokens == 512
    equal(cold, warm)


def test_a_canary_looks_at_dense_blocks_alone(full, monkeypatch):
    salt, prompt = "verify_hits", tiny.prompt(300, seed=6)
    turn = following(prompt, ask(full, prompt, 250, salt))
    store = full._prefix.store
    checked = full.store_stats()["host"].checked
    with monkeypatch.context() as patch:
        patch.setattr(store, "config", dataclasses.replace(store.config, verify_hits=1.0))
        assert ask(full, turn, 1, salt).cached_tokens == 0
    stats = full.store_stats()["host"]
    assert (stats.checked - checked, stats.errors) == (3, {})


def test_salts_and_profiles_share_nothing(engine, monkeypatch):
    salt, prompt = "alone", tiny.prompt(300, seed=8)
    turn = following(prompt, ask(engine, prompt, 250, salt))
    assert ask(engine, turn, 1, "another").cached_tokens == 0
    if engine.caches.window:  # a smaller budget of one request is another profile
        assert ask(engine, turn, 1, salt, token_budget=160).cached_tokens == 256
    salt = "without the flag"
    turn = following(prompt, ask(engine, prompt, 250, salt))
    store = engine._prefix.store
    with monkeypatch.context() as patch:
        patch.setattr(store, "config", dataclasses.replace(store.config, store_generated=False))
        assert ask(engine, turn, 1, salt).cached_tokens == 256


def test_tokens_that_were_read_through_the_views_count_as_generated(engine):
    salt, prompt = "read", tiny.prompt(400, seed=9)
    first = ask(engine, prompt, 150, salt, compress_after=300)
    assert ask(engine, following(prompt, first), 1, salt).cached_tokens == 512
    assert len(stored(engine, [*prompt, *first.tokens], salt, fork=1)) == 2


def test_what_a_cancelled_request_has_said_is_stored(engine):
    """A conversation that was stopped goes on from what is on the screen."""
    salt, prompt = "cancelled", tiny.prompt(300, seed=10)
    with Client() as client:
        running = client.submit(
            engine, prompt, dataclasses.replace(GREEDY, max_tokens=590), leave_after=60, cache_salt=salt
        )
        running.wait()
    settle(engine)
    heard = [token for delta in running.deltas for token in delta.tokens]
    assert 213 <= len(heard) < 590
    turn = [*prompt, *heard, *tiny.prompt(150)]
    assert ask(engine, turn[:850], 1, salt).cached_tokens == 512


def test_several_at_once(engine):
    prompts = [tiny.prompt(length, seed=11) for length in (300, 310, 290, 420)]
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (250, 240, 260, 130)]
    answers = engine.generate(prompts, params, progress=False)
    settle(engine)
    turns = [following(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    found = engine.generate(turns, dataclasses.replace(GREEDY, max_tokens=1), progress=False)
    assert [each.cached_tokens for each in found] == [512] * 4
    settle(engine)


def test_a_thread_that_is_far_behind_costs_what_it_would_have_stored_and_no_time(full, monkeypatch):
    salt, prompt = "behind", tiny.prompt(300, seed=12)
    cold = ask(full, prompt, 250, "cold " + salt)
    monkeypatch.setattr(full._prefix.executor, "_offered", threading.Semaphore(1))
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        assert go_on.wait(60)

    full._prefix.executor.put(stop)
    assert stopped.wait(60)
    with Client() as client:  # the answer is there while nothing can be saved
        first = client.submit(full, prompt, dataclasses.replace(GREEDY, max_tokens=250), cache_salt=salt).result()
    go_on.set()
    settle(full)
    assert first.tokens == cold.tokens
    assert ask(full, following(prompt, first), 1, salt).cached_tokens == 256


@pytest.mark.parametrize("call", [0, 3, 6, 11, 14])
def test_a_fault_on_the_way_ends_what_is_stored_of_a_turn(full, monkeypatch, caplog, call):
    """The first six calls are for the tail of the prompt in three layers, and the next six for the first tokens."""
    salt, prompt, calls, original = str(call), tiny.prompt(300, seed=13), itertools.count(), BlockAssembler._buffer

    def fails(chunks: BlockAssembler, index: int) -> np.ndarray:
        if next(calls) == call:
            raise RuntimeError("told to fail")
        return original(chunks, index)

    monkeypatch.setattr(BlockAssembler, "_buffer", fails)
    first = ask(full, prompt, 250, salt)
    assert "told to fail" in caplog.text
    assert ask(full, following(prompt, first), 1, salt).cached_tokens == 256


def test_generated_chunks_come_from_slower_tiers_as_well(full):
    salt, prompt = "far", tiny.prompt(300, seed=14)
    turn = following(prompt, ask(full, prompt, 250, salt))
    store = full._prefix.store
    behind(full, seconds=0.0)
    try:
        with Client() as client:
            params = dataclasses.replace(GREEDY, max_tokens=1)
            running = client.submit(full, turn, params, cache_salt=salt)
            running.result()
        settle(full)
        assert running.deltas[-1].timing.prefix == {"remote": 512, "computed": 188}
    finally:
        assert store.wait(10.0)
        store.replace_tiers(())
