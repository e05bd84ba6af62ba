"""`python -m kvjax.search` as its user meets it: the table, the file, Ctrl-C and on again, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kvjax.search.__main__ import main
from kvjax.search.config import SearchConfig, read_config

ROOT = Path(__file__).parents[2]
FIELDS = {
    "model": str(ROOT / "models/kvjax_small"),
    "tasks": ["mini/niah_single_1"],
    "token_budget": 32,
    "length": 128,
    "allocator": "evolution",
    "evaluations": 60,
    "samples": 4,
    "selection": 4,
    "test": 4,
    "batch": 10,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"runs": str(tmp_path / "runs"), "output": str(tmp_path / "found.json")}))
    return path


def test_a_search_prints_a_table_and_writes_a_profile(config, capsys, tmp_path):
    main(["--config", str(config)])
    out = capsys.readouterr().out
    for name in ("full", "evolution", "uniform", "entropy"):
        assert name in out
    assert f"python -m kvjax.serve {FIELDS['model']} --budgets {tmp_path / 'found.json'}" in out
    document = json.loads((tmp_path / "found.json").read_text())
    assert len(document["layers"]) == 8
    assert sum(document["provenance"]["tokens_retained_of_a_prompt"]) == 8 * 32
    assert len(document["model"]["weights"]) == 64
    assert document["provenance"]["made_by"] == f"python -m kvjax.search --config {config}"


def test_a_search_that_expands_prints_every_budget_and_writes_a_profile_of_each(config, capsys, tmp_path):
    main(["--config", str(config), "--set", "expand=[24, 64]", "allocator=greedy"])
    out = capsys.readouterr().out
    for mean in (24, 32, 64):
        assert f"{mean} kept" in out
    for mean in (24, 64):
        document = json.loads((tmp_path / f"found-{mean}.json").read_text())
        assert sum(document["provenance"]["tokens_retained_of_a_prompt"]) == 8 * mean


@pytest.mark.slow  # two processes
def test_ctrl_c_saves_and_the_same_command_goes_on(config, tmp_path):
    command = [sys.executable, "-m", "kvjax.search", "--config", str(config), "--set", "evaluations=400"]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert first.stderr is not None
    seen = ""
    while "best" not in seen:
        seen += os.read(first.stderr.fileno(), 4096).decode()
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same command goes on from there" in error
    assert list((tmp_path / "runs" / "evolution").iterdir())
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "found.json").exists()


@pytest.mark.slow  # four processes
def test_a_search_killed_twice_ends_in_the_bits_of_one_that_was_not(config, tmp_path):
    command = [sys.executable, "-m", "kvjax.search", "--config", str(config), "--set", "evaluations=2000"]
    whole = [*command, f"output={tmp_path / 'whole.json'}", f"runs={tmp_path / 'whole'}"]
    subprocess.run(whole, cwd=ROOT, capture_output=True, check=True, timeout=600)
    saved: set[Path] = set()
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 300
        while (found := set((tmp_path / "runs/evolution").glob("[0-9]*"))) <= saved and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        saved |= found
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=600)
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("found.search.json", "whole.search.json"))
    for fields in (generation for each in (one, other) for generation in each["history"]):
        del fields["seconds"]
    assert one["history"] == other["history"]
    assert one["chosen"]["candidate"] == other["chosen"]["candidate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["budget=3"], "unexpected keyword argument 'budget'"),
        (["token_budget=4"], "less than the 12 tokens that every layer keeps"),
        (["token_budget=4000"], "nothing is compressed"),
        (["token_budget"], "write NAME=VALUE"),
        (["tasks=[]"], "tasks is empty"),
        (["search=rocketkv", "mode=paper"], "are no tokens to share"),
        (["allocator=greedy", "mode=paper"], "set allocator=evolution"),
        (["search=rocketkv", "compare=[greedy]"], "compare nothing else"),
        (["expand=[32]"], "names the token budget that is searched"),
    ],
)
def test_bad_settings_are_said_at_once(config, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "--set", *changes])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tasks=[mini/nothing]"], "no task 'mini/nothing'"),
        (["model=/nowhere"], "/nowhere"),
        (["length=16", "token_budget=14"], "do not fit"),
    ],
)
def test_what_cannot_be_searched_ends_with_a_sentence(config, capsys, changes, message):
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "--set", *changes])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_the_configs_that_ship_are_valid():
    paths = sorted((ROOT / "configs/search").glob("*.yaml"))
    assert paths
    for path in paths:
        assert isinstance(read_config(path), SearchConfig)
        assert read_config(path).output is not None
