"""Training as a whole at toy size: it learns, it resumes to the bit, it exports what others can read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import load
from kvjax.train.checkpoint import Place
from kvjax.train.config import StageConfig
from kvjax.train.step import Batch, forward, loss, make_batch, optimiser
from kvjax.train.trainer import Trainer


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def finished(toy):
    """A run that was never killed: its trainer and its last state."""
    trainer = Trainer(toy)
    return trainer, trainer.run()


def test_a_killed_run_that_resumes_ends_in_the_same_bits(toy, finished, tmp_path):
    """Killed between checkpoints of the first stage and then of the second; lost steps are done again."""
    _, whole = finished
    other = dataclasses.replace(toy, runs=tmp_path)
    trainer = Trainer(other)
    for stop_after in (3, 5):
        killed = trainer.run(stop_after=stop_after)
        assert any(not np.array_equal(a, b) for a, b in zip(leaves(killed), leaves(whole), strict=True))
    resumed = Trainer(other).run()
    for a, b in zip(leaves(resumed), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_has_nothing_left_to_do(toy, finished):
    trainer, whole = finished
    log = (toy.runs / "log.jsonl").read_text()
    for a, b in zip(leaves(trainer.run()), leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (toy.runs / "log.jsonl").read_text() == log


def test_the_export_computes_what_was_trained(toy, finished):
    trainer, state = finished
    fields = json.loads((toy.tokenizer / "config.json").read_text())
    assert fields["model_type"] == "qwen3"
    assert fields["max_position_embeddings"] == 128
    tokens = jnp.arange(20)[None] + 6
    np.testing.assert_array_equal(
        load(toy.tokenizer)(tokens), forward(trainer.graph, state["params"], tokens, "float32")
    )
    generation = json.loads((toy.tokenizer / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 5]


def test_an_export_elsewhere_is_whole_and_leaves_the_tokenizers_folder_alone(toy, finished, tmp_path):
    _, state = finished
    before = {file: file.read_bytes() for file in toy.tokenizer.iterdir()}
    trainer = Trainer(dataclasses.replace(toy, export=tmp_path / "model"))
    folder = trainer.export(Place(len(toy.stages), 0), state)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: content for file, content in before.items()
    }
    assert {file: file.read_bytes() for file in toy.tokenizer.iterdir()} == before


def test_the_log_tells_accuracy_of_each_kind(toy, finished):
    lines = [json.loads(line) for line in (toy.runs / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(0, 4), (0, 6), (1, 4)]
    for line in lines:
        assert set(line["scores"]) == {"repeats", "recall", "needles", "variables"}
        assert 0 <= line["scores"]["needles"]["replies"] <= 1


def test_a_small_model_learns_a_batch_by_heart(toy):
    trainer = Trainer(toy)
    batch = make_batch(trainer.documents, toy, 0, 0)
    stage = StageConfig(context=64, batch=2, steps=200, warmup=5, learning_rate=1e-2, mix={})
    optimise = optimiser(toy, stage)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(lambda p: loss(trainer.graph, p, batch, "float32"))(params)
        updates, state = optimise.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    params, state = trainer.first, optimise.init(trainer.first)
    losses = []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 5
    assert losses[-1] < 0.5


def test_tokens_that_do_not_count_have_no_say(toy):
    trainer = Trainer(toy)
    batch = make_batch(trainer.documents, toy, 0, 1)
    last = int(np.flatnonzero(np.asarray(batch.mask[0]))[-1])
    changed = batch.tokens.at[0, last + 1 :].set(7)
    masked = Batch(batch.tokens, batch.mask.at[0, last + 1 :].set(False))
    one = loss(trainer.graph, trainer.first, masked, "float32")
    two = loss(trainer.graph, trainer.first, Batch(changed, masked.mask), "float32")
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_the_rate_warms_up_and_cools_down(toy):
    stage = StageConfig(context=64, batch=1, steps=10, warmup=4, cooldown=2, learning_rate=1.0, mix={})
    config = dataclasses.replace(toy, weight_decay=0.0, betas=(0.0, 0.0))
    optimise = optimiser(config, stage)
    params = {"x": jnp.zeros(())}
    state, moves = optimise.init(params), []
    for _ in range(10):  # with no memory Adam moves by the rate itself
        updates, state = optimise.update({"x": jnp.ones(())}, state, params)
        moves.append(-float(updates["x"]))
    np.testing.assert_allclose(moves, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5], rtol=1e-5)


def test_bfloat16_arithmetic_keeps_float32_weights(toy):
    config = dataclasses.replace(toy, model=dataclasses.replace(toy.model, dtype="bfloat16"))
    trainer = Trainer(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.first)} == {jnp.dtype("float32")}
    tokens = jnp.arange(16)[None] + 6
    wide = forward(trainer.graph, trainer.first, tokens, "float32")
    narrow = forward(trainer.graph, trainer.first, tokens, "bfloat16")
    assert narrow.dtype == jnp.float32
    assert 0 < float(jnp.abs(wide - narrow).max()) < 0.3


def test_a_missing_tokenizer_says_how_to_make_one(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m kvjax\.train\.tokenizer"):
        Trainer(dataclasses.replace(toy, tokenizer=tmp_path / "none"))
