"""A run that is killed without warning and started again ends in the same bits; each stage compiles once."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from kvjax.train import trainer as module
from kvjax.train.evaluation import Score
from kvjax.train.step import make_step
from kvjax.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
DEADLINE = 300  # seconds


def test_each_stage_compiles_its_step_once(toy, tmp_path, monkeypatch):
    """From nothing, and from a checkpoint, whose arrays could differ in what jit looks at."""
    steps = []

    def counted(*args):
        steps.append(make_step(*args))
        return steps[-1]

    monkeypatch.setattr(module, "make_step", counted)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: {"needles": Score(0.0, 0.0, 0.0)})
    config = dataclasses.replace(toy, runs=tmp_path)
    Trainer(config).run(stop_after=3)
    Trainer(config).run()
    assert [step._cache_size() for step in steps] == [1, 1, 1]  # killed in the first stage, that stage, the second


def configuration(toy, folder: Path, tokenizer: Path) -> Path:
    """The toy as a YAML file that trains into `folder`, with a tokenizer of its own, since weights go there."""
    folder.mkdir()
    for file in tokenizer.glob("*"):
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    fields = dataclasses.asdict(toy) | {"tokenizer": str(folder), "runs": str(folder / "runs"), "save_every": 3}
    fields["stages"] = [stage | {"steps": 20} for stage in fields["stages"]]
    fields["betas"] = list(toy.betas)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def start(config: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "kvjax.train", "--config", str(config)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow  # four processes that import JAX and compile, one after another
def test_a_killed_process_that_is_started_again_ends_in_the_same_bits(toy, tokenizer_folder, tmp_path):
    whole, broken = (configuration(toy, tmp_path / name, tokenizer_folder) for name in ("whole", "broken"))
    assert start(whole).wait(DEADLINE) == 0

    checkpoints = broken.parent / "runs" / "checkpoints"
    for least in (6, 24):  # in the first stage, then in the second, wherever the process happens to be by then
        process = start(broken)
        limit = time.monotonic() + DEADLINE
        while not [path for path in checkpoints.glob("*") if path.name.isdigit() and int(path.name) >= least]:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < limit, "it never came so far"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(DEADLINE) == -signal.SIGKILL

    assert start(broken).wait(DEADLINE) == 0
    one, two = (load_file(config.parent / "model.safetensors") for config in (whole, broken))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
