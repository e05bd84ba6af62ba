"""Configs are read whole or refused with the bound that was broken."""

from pathlib import Path

import pytest

from kvjax.train.config import ModelConfig, StageConfig, read_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["cpu", "cpu-2048", "h200"])
def test_the_configs_that_ship_are_valid(name):
    config = read_config(ROOT / "configs" / "train" / f"{name}.yaml")
    contexts = [stage.context for stage in config.stages]
    assert contexts == sorted(contexts)
    assert config.max_context == contexts[-1]
    assert config.tokenizer.parts[0] == "models"


def test_no_two_configs_write_to_one_folder():
    """Nor does any but its own recipe write over the model that ships."""
    folders = [read_config(path).folder for path in sorted((ROOT / "configs/train").glob("*.yaml"))]
    assert len(set(folders)) == len(folders)


def test_a_field_that_does_not_exist_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("tokenizer: t\nruns: r\nsteps_total: 3\nstages: [{context: 64, batch: 1, steps: 300, mix: {}}]\n")
    with pytest.raises(TypeError, match="steps_total"):
        read_config(path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mix": {"poems": 1.0}}, "poems"),
        ({"context": 32}, "at least 64"),
        ({"context": 256, "halvings": 3}, "halved 3 times"),
        ({"halvings": -1}, "halved -1 times"),
        ({"steps": 100}, "warmup"),
        ({"batch": 0}, "positive"),
    ],
)
def test_stages_out_of_bounds_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        StageConfig(**{"context": 64, "batch": 1, "steps": 300, "mix": {"repeats": 1.0}, **fields})


def test_a_dtype_that_is_neither_of_two_is_refused():
    with pytest.raises(ValueError, match="float16"):
        ModelConfig(dtype="float16")
