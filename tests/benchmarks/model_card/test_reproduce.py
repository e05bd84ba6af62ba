"""The one command, at toy size; and a run's log read back after kills."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from benchmarks.model_card import reproduce
from benchmarks.model_card.curve import history, plot, stages, summary
from kvjax.train.config import read_config

ROOT = Path(__file__).parents[3]


def log(config, *lines):
    config.runs.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (config.runs / "log.jsonl").write_text(text)


def evaluation(stage, context, total, rate, share):
    scores = {"needles": {"tokens": share, "replies": share, "loss": 1.0}}
    return {"stage": stage, "context": context, "total": total, "tokens_per_second": rate, "scores": scores}


def test_a_step_done_twice_counts_once_and_tokens_add_up(toy, tmp_path):
    config = dataclasses.replace(toy, runs=tmp_path / "run")
    # killed after step 6 of 6, resumed from step 2; the first stage takes 2 x 64 tokens a step, the second 128
    steps = [(0, 64, 4, 64.0, 0.1), (0, 64, 6, 64.0, 0.2), (0, 64, 4, 128.0, 0.1), (0, 64, 6, 128.0, 0.2)]
    log(config, *(evaluation(*step) for step in [*steps, (1, 128, 10, 256.0, 0.9)]))
    assert [(line["total"], line["tokens"]) for line in history(config)] == [(4, 512), (6, 768), (10, 1280)]
    assert summary(config) == "10 steps, 0.0M tokens, 8 s, context 128"
    assert [text.split()[:3] for text in stages(config)] == [["context", "64", "6"], ["context", "128", "10"]]
    plot(config, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_where_retrieval_appeared_is_told_with_the_evaluation_before(toy, tmp_path):
    config = dataclasses.replace(toy, runs=tmp_path)
    lines = [evaluation(0, 64, total, 64.0, 0.1) for total in (2, 4, 6)]
    for line, share in zip(lines, (0.1, 0.2, 0.7), strict=True):
        line["scores"]["recall"] = {"tokens": share, "replies": share, "loss": 1.0}
    log(config, *lines)
    assert stages(config)[-1] == "retrieval appeared: recall 0.20 at step 4 and 0.70 at step 6, 0.00M tokens"


def test_a_run_that_has_not_begun_says_so(toy, tmp_path):
    with pytest.raises(FileNotFoundError, match="train first"):
        history(dataclasses.replace(toy, runs=tmp_path))


def test_the_larger_model_fits_in_16_megabytes_and_its_toy_apart_from_it():
    config = read_config(ROOT / "configs" / "train" / "h200.yaml")
    m = config.model
    heads = 2 * m.heads + 2 * m.kv_heads
    layer = m.width * (heads * m.head_dim + 3 * m.mlp_width + 2) + 2 * m.head_dim
    size = m.layers * layer + m.width * (config.vocabulary + 1)
    assert m.tied
    assert 5e6 < size < 8e6
    assert size * {"bfloat16": 2, "float32": 4}[m.saved_dtype] <= 16e6
    contexts = [stage.context for stage in config.stages]
    assert contexts == [64 * 2**i for i in range(10)]
    small = reproduce.toy(config)
    assert small.tokenizer != config.tokenizer
    assert small.runs != config.runs


@pytest.mark.slow  # trains, measures and draws: a dozen compilations
def test_one_command_trains_proves_and_goes_on_where_it_was(tokenizer_folder, tmp_path, capsys):
    fields = yaml.safe_load((ROOT / "configs" / "train" / "h200.yaml").read_text())
    fields |= {"runs": str(tmp_path / "runs"), "vocabulary": 2048, "processes": 1}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            reproduce.main(["--config", str(path), "--toy"])
        assert ended.value.code == 0
    report = tmp_path / "runs" / "toy" / "report"
    names = {"curve.png", "gate.png", "gate.json", "eviction.json", "code.json", "summary.json"}
    assert {file.name for file in report.iterdir()} == names
    assert json.loads((report / "summary.json").read_text())["passed"] == dict.fromkeys(
        ("gate", "eviction", "code"), False
    )
    # the second call trained nothing
    lines = (tmp_path / "runs" / "toy" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 * reproduce.TOY_STAGES
    assert "trained in" in capsys.readouterr().out
