"""The gate: batched answers are those of one prompt alone, needles stand where they are put, bars are kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.eval.tasks import find_task
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig, random, save
from kvjax.train import gate as module
from kvjax.train.depth import at_depth
from kvjax.train.gate import Figure, Gate, line
from kvjax.train.gate_plot import grid, plot
from kvjax.train.greedy import Greedy

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=1280,
    width=32,
    mlp_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerConfig(RopeConfig(8, 1e4)),) * 2,
    query_scale=1.0,
    norm_eps=1e-6,
    max_position=256,
    qk_norm=True,
    eos_token_ids=(3,),
)


@pytest.fixture(scope="module")
def decoder():
    return random(CONFIG, jax.random.key(0), embedding_std=1.0)


@pytest.fixture(scope="module")
def logits(decoder):
    graph, params = nnx.split(decoder)
    return jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))


def by_hand(logits, prompt, new):
    """One prompt, all of it computed again for every token; the padding comes after and is not seen."""
    ids = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(ids)] = ids
        token = int(jnp.argmax(logits(padded)[0, len(ids) - 1]))
        if token in CONFIG.eos_token_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_prompts_answered_together_are_answered_as_each_alone(decoder, logits):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(6, 1280, size=size).tolist() for size in (1, 40, 17, 33, 40)]
    found = Greedy(decoder).generate(prompts, size=40, batch=2, new=5)
    assert found == [by_hand(logits, prompt, 5) for prompt in prompts]


def test_an_answer_stops_where_the_model_ends_it(decoder, logits):
    prompt = [7, 8, 9]
    whole = by_hand(logits, prompt, 5)
    ending = dataclasses.replace(CONFIG, eos_token_ids=(whole[2],))
    decoder.config, kept = ending, decoder.config
    try:
        [found] = Greedy(decoder).generate([prompt], size=8, batch=1, new=5)
    finally:
        decoder.config = kept
    assert found == whole[: whole.index(whole[2])]


def test_a_prompt_that_does_not_fit_is_refused(decoder):
    with pytest.raises(ValueError, match="9 tokens, must be 1 to size=8"):
        Greedy(decoder).generate([[7] * 9], size=8, batch=1, new=1)


@pytest.mark.parametrize("task", ["mini/niah_single_1", "mini/niah_single_3", "mini/niah_multikey_1"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_needle_stands_where_it_was_put_and_nothing_else_changes(task, depth):
    sample = find_task(task).sample(length=200, seed=1, count=lambda text: len(text.split()))
    moved = at_depth(sample, depth)
    before, after = (s.context.rstrip("\n").split(". ") for s in (sample, moved))
    place = [index for index, text in enumerate(after) if sample.answers[0] in text]
    assert place == [round(depth * (len(after) - 1))]
    assert sorted(text.rstrip(".") for text in before) == sorted(text.rstrip(".") for text in after)
    assert dataclasses.replace(moved, context="") == dataclasses.replace(sample, context="")


def test_a_value_that_two_keys_share_is_told_apart_by_its_key():
    sample = find_task("mini/niah_multikey_2").sample(length=60, seed=1, count=lambda text: len(text.split()))
    twice = dataclasses.replace(sample, context=f"The code for nobody is {sample.answers[0]}. {sample.context}")
    moved = at_depth(twice, 1.0).context
    assert moved.endswith(f"{sample.answer_prefix} {sample.answers[0]}.\n")


def test_a_depth_needs_one_answer_in_one_sentence():
    count = len
    several = find_task("mini/niah_multivalue").sample(length=600, seed=1, count=count)
    with pytest.raises(ValueError, match="4 answers"):
        at_depth(several, 0.5)
    sample = find_task("mini/niah_single_1").sample(length=600, seed=1, count=count)
    with pytest.raises(ValueError, match="0 sentences"):
        at_depth(dataclasses.replace(sample, context="Nothing here.\n"), 0.5)
    with pytest.raises(ValueError, match=r"depth is 1\.5"):
        at_depth(sample, 1.5)


def figure(task, length, accuracy, depths=None):
    return Figure(task, "completion", length, 20, accuracy, depths or {}, 0, None)


def test_bars_are_of_needles_and_tracking():
    assert figure("mini/niah_single_1", 256, 0.95).passes
    assert not figure("mini/niah_multikey_3", 256, 0.94).passes
    assert figure("mini/vt", 256, 0.90).passes
    assert "below 90%" in line(figure("mini/vt", 256, 0.89))
    assert figure("mini/niah_multivalue", 256, 0.0).passes


def test_the_grid_is_the_mean_over_tasks_and_a_hole_where_nothing_was_measured(tmp_path):
    figures = [
        figure("mini/niah_single_1", 64, 1.0, {0.0: 1.0, 1.0: 0.5}),
        figure("mini/niah_single_2", 64, 1.0, {0.0: 0.0, 1.0: 0.5}),
        figure("mini/niah_single_1", 128, 1.0, {0.0: 0.25}),
        figure("mini/niah_multikey_1", 64, 1.0, {0.0: 0.1}),
        figure("mini/vt", 64, 0.9),
    ]
    lengths, depths, mean = grid(figures, "single")
    assert (lengths, depths) == ([64, 128], [0.0, 1.0])
    np.testing.assert_array_equal(mean, [[0.5, 0.25], [0.5, np.nan]])
    plot(figures, {"mini/vt": 0.9}, tmp_path / "gate.png")
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_knows_nothing_fails_and_its_figures_are_written(decoder, tokenizer_folder, tmp_path, capsys):
    for file in tokenizer_folder.glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save(decoder, tmp_path)
    gate = Gate(tmp_path)
    tasks = ["mini/niah_single_1", "mini/niah_multivalue"]
    command = ["--model", str(tmp_path), "--lengths", "128", "--depths", "2", "--samples", "1", "--compared", "0"]
    command += ["--forms", "completion", "--tasks", *tasks, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        module.main(command)
    assert ended.value.code == 1
    assert "gate: fails: mini/niah_single_1 completion at 128" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert [f["task"] for f in written["figures"]] == tasks
    assert written["figures"][0]["depths"] == {"0.0": 0.0, "1.0": 0.0}
    with pytest.raises(ValueError, match="do not fit"):
        gate.samples("mini/vt", 48, "completion", 1, 1)


@pytest.mark.parity
def test_transformers_answers_the_same(decoder, tokenizer_folder, tmp_path):
    for file in tokenizer_folder.glob("*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save(decoder, tmp_path)
    gate = Gate(tmp_path)
    found = gate.measure("mini/niah_single_1", 128, "chat", depths=1, each=2, compared=2)
    assert found.agreement == 1.0
