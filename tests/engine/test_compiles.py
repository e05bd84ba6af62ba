"""After warm-up nothing is compiled, whatever is asked."""

import dataclasses

import jax
import numpy as np
import pytest

from kvjax.engine import Engine, EngineConfig, Finish, SamplingParams
from kvjax.engine.device.compiles import CompileCounter
from kvjax.models import LayerConfig, RopeConfig
from tests.engine import tiny
from tests.engine.client import Client, settle

# Sizes that no other test has: what one of them compiled must not serve here.
ROPE = RopeConfig(8, 1e4)
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    vocab_size=291,
    width=36,
    mlp_width=56,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    layers=(LayerConfig(ROPE, 70), LayerConfig(ROPE)),
)
LONGEST, SLOTS, REQUESTS = 300, 3, 200


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("other"), CONFIG)
    config = EngineConfig(max_model_len=LONGEST, max_num_seqs=SLOTS, prefill_chunk_size=256)
    with Engine.from_pretrained(folder, config) as engine:
        assert engine.layout.buckets == (64, 256, 512)
        yield engine


def anything(random: np.random.Generator) -> tuple[list[int], SamplingParams]:
    """A request with whatever a client may ask for."""

    def choose(*values):
        return values[random.integers(len(values))]

    length = int(choose(1, 5, 63, 64, 65, 200, 255, 256, 257, LONGEST - 1, LONGEST))
    most = min(int(choose(0, 1, 1, 2, 5, 100)), LONGEST - length)
    some = random.choice(CONFIG.vocab_size, 5, replace=False).tolist()
    return random.integers(0, CONFIG.vocab_size, length).tolist(), SamplingParams(
        max_tokens=most,
        temperature=choose(0.0, 0.5, 1.0, 2.0),
        top_p=choose(0.1, 0.9, 1.0),
        top_k=choose(0, 1, 5, 1000),
        min_p=choose(0.0, 0.2),
        presence_penalty=choose(0.0, 1.0),
        frequency_penalty=choose(0.0, -1.0),
        repetition_penalty=choose(1.0, 1.5),
        logit_bias=choose({}, dict.fromkeys(some, 5.0)),
        seed=choose(None, 3),
        stop=choose((), ("a", "th", "\n")),
        stop_token_ids=choose((), tuple(some)),
        ignore_eos=choose(True, False),
        min_tokens=choose(0, most),
        logprobs=choose(None, 0, 1, 20),
        prompt_logprobs=choose(None, None, 0, 7),
    )


def test_nothing_is_compiled_after_warm_up(engine):
    random = np.random.default_rng(0)
    with Client() as client:
        callers = []
        for number in range(REQUESTS):
            prompt, params = anything(random)
            callers.append(client.submit(engine, prompt, params, leave_after=int(random.choice([1, 2, 99, 99]))))
            if number % 11 == 0:
                callers[random.integers(len(callers))].disconnect()
            if number % 20 == 0:
                callers[-1].wait()
        engine.generate([[1, 2], "the end"], progress=False)
        for caller in callers:
            caller.wait()
        settle(engine)
    stats = engine.stats()
    assert stats.submitted > REQUESTS - 20
    assert stats.cancelled > 0
    assert stats.finished > 100
    assert stats.compiles_after_warmup == 0
    assert {caller.deltas[-1].finish for caller in callers if caller.deltas} <= {None, *Finish} - {Finish.ERROR}


def test_the_counter_counts(engine):
    """And only from warm-up to close."""
    counter = CompileCounter()

    def compile_something(constant: float) -> None:
        jax.jit(lambda x: x * constant)(np.float32(1))

    compile_something(1.5)
    counter.start()
    counter.start()  # listens once
    before = engine.stats().compiles_after_warmup
    compile_something(2.5)
    assert engine.stats().compiles_after_warmup == before + 1
    assert counter.count == 1
    counter.stop()
    counter.stop()
    compile_something(3.5)
    assert counter.count == 1
    assert engine.stats().compiles_after_warmup == before + 2
