"""The gate: answers are the model's own, however many at once; needles stand where they are put, bars are kept."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.model_card import gate as module
from benchmarks.model_card.depth import at_depth
from benchmarks.model_card.figure import Figure
from benchmarks.model_card.gate import RetrievalGate, line, serving
from benchmarks.model_card.gate_plot import grid, plot
from kvjax.eval.tasks import find_task
from kvjax.models import DecoderConfig, LayerConfig, RopeConfig, random, save

CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=1280,
    width=32,
    mlp_width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerConfig(RopeConfig(8, 1e4)),) * 2,
    query_scale=8**-0.5,
    norm_eps=1e-6,
    max_position=256,
    qk_norm=True,
    eos_token_ids=(3,),
)
ENDS = [7, 8, 9]  # the answer to this prompt ends with its third token


@pytest.fixture(scope="module")
def logits():
    graph, params = nnx.split(random(CONFIG, jax.random.key(0), embedding_std=1.0))
    return jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))


def by_hand(logits, prompt, new):
    """One prompt, all of it computed again for every token; the padding comes after and is not seen."""
    ids = list(prompt)
    for _ in range(new):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(logits(padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def ending(logits):
    """A token that the model writes, which shall end its texts."""
    return by_hand(logits, ENDS, 3)[2]


@pytest.fixture(scope="module")
def folder(ending, tokenizer_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for file in tokenizer_folder.glob("*"):
        (path / file.name).write_bytes(file.read_bytes())
    config = dataclasses.replace(CONFIG, eos_token_ids=(3, ending))
    save(random(config, jax.random.key(0), embedding_std=1.0), path)
    return path


@pytest.fixture(scope="module")
def gate(folder):
    with serving(folder, 128) as engine:
        yield RetrievalGate(folder, engine)
        engine.check_integrity()


def test_answers_are_the_models_own_as_far_as_it_ends_them_or_they_have_room(gate, logits, ending):
    rng = np.random.default_rng(0)
    prompts = [ENDS, *(rng.integers(6, 1280, size=size).tolist() for size in (1, 40, 17, 33, 40, 120, 127, 90, 64))]
    rooms = [5, 5, 9, 1, 2, 8, 8, 1, 5, 5]
    found = [gate.cut(answer.tokens) for answer in gate.answers(prompts, rooms)]
    whole = [by_hand(logits, prompt, room) for prompt, room in zip(prompts, rooms, strict=True)]
    assert found == [list(itertools.takewhile(lambda token: token not in (3, ending), reply)) for reply in whole]
    assert found[0] == whole[0][: whole[0].index(ending)]
    assert max(map(len, found)) == 9


def test_a_reply_is_cut_at_the_first_token_that_ends_a_text(gate, ending):
    assert gate.cut([7, 8, 3, 9, 3]) == [7, 8]
    assert gate.cut((7, 8, ending)) == [7, 8]
    assert gate.cut([7, 8]) == [7, 8]


def test_a_length_that_the_model_does_not_have_is_refused(folder, gate, monkeypatch):
    assert serving(folder, 1000).max_model_len == CONFIG.max_position
    with pytest.raises(ValueError, match="129 tokens do not fit the model's context of 128"):
        gate.samples("mini/niah_single_1", 129, "completion", 1, 1)
    monkeypatch.setattr(gate, "ids", lambda sample, form: [7] * 128)
    with pytest.raises(ValueError, match="a prompt has 128 tokens, which leaves no room for an answer in 128"):
        gate.measure("mini/niah_single_1", 128, "completion", depths=1, each=1, compared=0)


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


def test_a_model_that_knows_nothing_fails_and_its_figures_are_written(folder, gate, tmp_path, capsys):
    tasks = ["mini/niah_single_1", "mini/niah_multivalue"]
    command = ["--model", str(folder), "--lengths", "128", "512", "--depths", "2", "--samples", "1", "--compared", "0"]
    command += ["--forms", "completion", "--tasks", *tasks, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        module.main(command)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    failed = ["mini/niah_single_1 completion at 128", "mini/niah_single_1 completion at 512"]
    assert f"gate: fails: {', '.join(failed)}" in printed
    assert "not measured: 512 tokens do not fit the model's context of 256" in printed
    written = json.loads((tmp_path / "gate.json").read_text())
    assert written["failed"] == failed
    assert [f["task"] for f in written["figures"]] == tasks
    assert written["figures"][0]["depths"] == {"0.0": 0.0, "1.0": 0.0}
    with pytest.raises(ValueError, match="do not fit"):
        gate.samples("mini/vt", 48, "completion", 1, 1)


@pytest.mark.parity
def test_transformers_answers_the_same(gate):
    found = gate.measure("mini/niah_single_1", 128, "chat", depths=1, each=2, compared=2)
    assert found.agreement == 1.0
