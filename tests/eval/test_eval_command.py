"""`python -m kvjax.eval` as its user sees it: what it prints, refuses, keeps, and how it ends."""

import json
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from kvjax.eval import __main__ as command
from kvjax.eval.arguments import KINDS
from kvjax.eval.command_target import open_target
from kvjax.eval.datasets import LOADERS
from kvjax.eval.metrics import METRICS
from kvjax.eval.targets import TargetFailedError, TargetGoneError
from kvjax.eval.tasks import TASKS
from tests.eval.fake_target import FakeTarget, reads
from tests.eval.openai_server import MODELS, serving

TWO = ["--tasks", "mini/niah_single_1", "mini/niah_single_2", "--lengths", "100", "200", "--samples", "3"]


@pytest.fixture
def target(monkeypatch):
    """What the command asks instead of a model; `target.starts` counts its starts."""
    target = FakeTarget(reads)
    target.starts = 0

    def start():
        target.starts += 1

    monkeypatch.setattr(command, "open_target", lambda given, resources: (target, start))
    return target


def wrong(capsys, *arguments: str) -> str:
    """What it says about arguments that it refuses."""
    try:
        status = command.main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    return " ".join(capsys.readouterr().err.split())


def test_help_list_and_show_need_no_jax():
    script = """
import contextlib, sys
from kvjax.eval.__main__ import main
main(["--list"]); main(["--show", "mini/vt"])
with contextlib.suppress(SystemExit):
    main(["--help"])
heavy = {"jax", "flax", "transformers", "openai", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "task catalogue" in done.stdout


def test_the_list_has_every_task_and_a_question_of_it(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, task in TASKS.items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert line.split()[1] == task.metric
    assert any("What is the code for" in line for line in lines)


def test_show_has_the_context_the_question_and_the_answers(capsys):
    assert command.main(["--show", "mini/niah_multikey_2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    key = text.split("What is the code for ")[1].split("?")[0]
    answer = text.split("right if it has: ")[1]
    assert f"The code for {key} is {answer}. " in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "mini/niah_singel_1"], "did you mean mini/niah_single_1"),
        (["--tasks", "niah_single_1"], "did you mean ruler/niah_single_1 or mini/niah_single_1?"),
        (["--tasks", "xyz*"], "--list shows all tasks"),
        (["--show", "xyz"], "--list shows all tasks"),
        (["--lengths", "0"], "--lengths 0 must be at least 1 token"),
        (["--lengths", "many"], "invalid int value: 'many'"),
        (["--samples", "0"], "--samples 0 must be more than 0"),
        (["--samples", "1000001"], "--samples 1000001 is more than the 1,000,000 of one seed"),
        (["--timeout", "nan"], "--timeout nan must be more than 0"),
        (["--concurrency", "0"], "concurrency=0 must be at least 1"),
        (["--form", "poem"], "invalid choice: 'poem'"),
        (["--tokenizer", "x"], "--tokenizer is for a server: give --url as well"),
        (["--api-key", "x"], "--api-key is for a server"),
        (["--data", "ruler"], "write it as KIND:FILE; kinds are ruler, longbench"),
        (["--data", "squad:x.json"], "write it as KIND:FILE; kinds are ruler, longbench"),
        (["--data", "ruler:/nowhere/vt.jsonl"], "no file /nowhere/vt.jsonl"),
        (["--url", "nowhere"], "url='nowhere' is no address: write it as http://localhost:8000"),
        (["--model", "/nowhere"], "no folder with a config.json"),
        (["--max-model-len", "999999"], "--max-model-len 999999 is more than the"),
        (["--lengths", "999999"], "--lengths 999999 is more than the"),
        (["--url", "http://x", "--method", "snapkv"], "--method is for an engine in this process, not for --url"),
        (["--url", "http://x", "--query-agnostic"], "--query-agnostic is for an engine in this process"),
        (["--method", "snapkv"], "needs a token_budget, or a file of budgets"),
        (["--method", "snapvk", "--token-budget", "64"], "method 'snapvk' is not known: one of full, rocketkv"),
        (["--token-budget", "64", "--budgets", "x.json"], "say the same thing twice"),
        (["--budgets", "/nowhere/budgets.json"], "/nowhere/budgets.json"),
        (["--token-budget", "8"], "token_budget=8 must be at least 16"),
        (["--token-budget", "64", "--headroom", "0"], "room=0 must be at least 1"),
        (["--query-agnostic"], "--query-agnostic says nothing here: full keeps all of"),
        (["--evict", "--tasks", "mini/turns_kv"], "--evict says nothing here: full keeps all of"),
        (
            ["--method", "quest", "--token-budget", "64", "--show-retained"],
            "--show-retained says nothing here: quest",
        ),
        (["--evict", "--tasks", "mini/vt"], "--evict tells in later turns, and no task has any"),
        (["--show-retained", "kept.pdf"], "'kept.pdf' is drawn as a PNG: end its name in .png"),
        (["--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_what_is_wrong_is_said_with_status_2(capsys, arguments, says):
    assert says in wrong(capsys, *arguments)


def test_a_missing_package_is_named_before_anything_is_asked(capsys, monkeypatch, target):
    def missing(prediction, answers):
        raise ImportError('needs rapidfuzz: pip install "kvjax[eval]"')

    monkeypatch.setitem(METRICS, "string_match_all", missing)
    assert 'pip install "kvjax[eval]"' in wrong(capsys, *TWO)
    assert not target.requests


def test_a_missing_package_takes_tasks_from_the_default_ones_only(capsys, monkeypatch, target):
    def missing(prediction, answers):
        raise ImportError("needs rapidfuzz")

    monkeypatch.setitem(METRICS, "edit_similarity", missing)
    target.say = lambda prompt: "no idea"
    assert command.main(["--samples", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "mini/next_line is left out: needs rapidfuzz" in err
    tasks = {cell["task"] for cell in json.loads(out)["cells"]}
    assert tasks == {name for name in TASKS if name.startswith("mini/")} - {"mini/next_line"}


def test_a_length_beyond_the_context_is_refused(capsys, target):
    assert "--lengths 5000 is more than the model's context of 4096 tokens" in wrong(capsys, "--lengths", "5000")


def test_a_table_and_status_0(capsys, target):
    assert command.main(TWO) == 0
    out = capsys.readouterr().out
    assert "fake  completion, greedy, 3 samples a cell" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["mini/niah_single_1"] == ["100.0", "44-100", "100.0", "44-100", "100.0"]
    assert rows["mean"] == ["of", "tasks", "100.0", "100.0", "100.0"]
    assert len(target.requests) == 12


def test_patterns_pick_tasks_once_each(capsys, target):
    target.say = lambda prompt: "no idea"
    assert command.main(["--tasks", "*/niah_single_1", "mini/niah_single_*", "--samples", "1", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [cell["task"] for cell in cells] == [
        "ruler/niah_single_1",
        *(f"mini/niah_single_{n}" for n in (1, 2, 3)),
    ]


def test_a_second_run_asks_only_what_is_new(capsys, target, tmp_path):
    file = tmp_path / "run.jsonl"
    output = ["--output", str(file), "--json"]
    assert command.main([*TWO, *output]) == 0
    first = capsys.readouterr().out
    before = file.read_bytes()
    target.requests.clear()
    assert command.main([*TWO, *output]) == 0
    assert (target.requests, target.starts, file.read_bytes()) == ([], 1, before)
    assert capsys.readouterr() == (first, f"12 of 12 samples are in {file} already\n")
    assert command.main([*TWO, "--samples", "5", "--lengths", "100", *output]) == 0
    assert len(target.requests) == 4  # two more of each task at one length
    summary = json.loads(capsys.readouterr().out)
    assert [cell["scored"] for cell in summary["cells"]] == [5, 5]
    assert summary == json.loads((tmp_path / "run.summary.json").read_text())


@pytest.mark.parametrize(
    "change", [["--form", "chat"], ["--seed", "1"], ["--temperature", "0.5"], ["--query-agnostic"]]
)
def test_other_settings_do_not_go_into_the_same_file(capsys, target, tmp_path, change):
    output = ["--output", str(tmp_path / "run.jsonl")]
    assert command.main([*TWO, *output]) == 0
    capsys.readouterr()
    said = wrong(capsys, *TWO, *output, *change)
    assert f"{change[0].strip('-').replace('-', '_')} was " in said
    assert "choose another name" in said


def test_failed_samples_are_shown_status_1_and_asked_again(capsys, target, tmp_path):
    output = ["--output", str(tmp_path / "run.jsonl")]
    calls = iter(range(99))

    def say(prompt):
        if next(calls) % 5 == 0:
            raise TargetFailedError("a bad moment")
        return reads(prompt)

    target.say = say
    assert command.main([*TWO, *output, "--concurrency", "1"]) == 1
    out, err = capsys.readouterr()
    assert out.count(" 1 failed ") == 3
    assert "3 samples failed and have no score:" in err
    assert "3 x  a bad moment" in err
    assert "Run the same command again" in err
    summary = json.loads((tmp_path / "run.summary.json").read_text())
    assert (summary["mean"], summary["failed"], summary["scored"]) == (1.0, 3, 9)
    assert summary["errors"] == [{"error": "a bad moment", "samples": 3}]
    target.say = reads
    target.requests.clear()
    assert command.main([*TWO, *output]) == 0
    assert len(target.requests) == 3


def test_a_server_that_goes_leaves_what_it_answered(capsys, target, tmp_path):
    calls = iter(range(99))

    def say(prompt):
        if next(calls) >= 5:
            raise TargetGoneError("Connection error.")
        return reads(prompt)

    target.say = say
    assert command.main([*TWO, "--output", str(tmp_path / "run.jsonl"), "--concurrency", "1"]) == 1
    err = capsys.readouterr().err
    assert "3 x  Connection error." in err
    assert "4 samples were not evaluated" in err


def test_ctrl_c_leaves_a_good_file_and_a_table(capsys, target, tmp_path, interruptible):
    output = ["--output", str(tmp_path / "run.jsonl")]
    calls = iter(range(99))

    def say(prompt):
        if next(calls) == 6:
            signal.raise_signal(signal.SIGINT)
        return reads(prompt)

    target.say = say
    assert command.main([*TWO, *output, "--concurrency", "2"]) == 130
    out, err = capsys.readouterr()
    assert "100.0" in out
    assert "samples were not evaluated" in err
    target.say = reads
    assert command.main([*TWO, *output]) == 0
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert len(lines) == 13  # the settings, and each sample once


def ruler_file(folder, samples: int, name: str = "niah_single_1"):
    path = folder / f"{name}.jsonl"
    row = {"input": "Many words. The key is 7.\nWhat is the special magic number for a mentioned?", "outputs": ["7"]}
    path.write_text(f"{json.dumps(row | {'answer_prefix': ' It is'})}\n" * samples)
    return path


def test_a_file_is_asked_whole_at_the_context_of_the_model(capsys, target, tmp_path):
    target.say = lambda prompt: "It is 7."
    path = ruler_file(tmp_path, 3)
    assert command.main(["--data", f"ruler:{path}", "--json", "--output", str(tmp_path / "run.jsonl")]) == 0
    summary = json.loads(capsys.readouterr().out)
    [cell] = summary["cells"]
    assert (cell["task"], cell["length"], cell["scored"], cell["mean"]) == ("data/ruler/niah_single_1", 4096, 3, 1.0)
    assert command.main(["--data", f"ruler:{path}", "--lengths", "200", "--samples", "2", "--json"]) == 0
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["length"], cell["scored"]) == (200, 2)
    # another content under the same name does not go on with these results
    ruler_file(tmp_path, 4)
    assert "data was " in wrong(capsys, "--data", f"ruler:{path}", "--output", str(tmp_path / "run.jsonl"))


def test_files_and_tasks_go_together_at_lengths_of_their_own(capsys, target, tmp_path):
    target.say = lambda prompt: "It is 7."
    data = ["--data", f"ruler:{ruler_file(tmp_path, 2)}", "--data", f"ruler:{ruler_file(tmp_path, 2, 'niah_single_2')}"]
    assert command.main([*data, "--tasks", "mini/niah_single_1"]) == 0
    out = capsys.readouterr().out
    assert "2 to 20 samples a cell" in out
    assert [line.split()[0] for line in out.splitlines() if "/niah" in line] == [
        "mini/niah_single_1",
        "data/ruler/niah_single_1",
        "data/ruler/niah_single_2",
    ]
    assert len(target.requests) == 24


def test_files_without_a_length_need_one(capsys, target, tmp_path):
    target.max_model_len = None
    assert "give --max-model-len" in wrong(capsys, "--data", f"ruler:{ruler_file(tmp_path, 2)}")
    other = tmp_path / "other"
    other.mkdir()
    twice = ["--data", f"ruler:{ruler_file(tmp_path, 2)}", "--data", f"ruler:{ruler_file(other, 2)}"]
    assert "has two files of data/ruler/niah_single_1" in wrong(capsys, *twice)


def test_the_kinds_of_data_are_those_that_can_be_loaded():
    assert list(LOADERS) == list(KINDS)


def test_a_server_that_does_not_tell_its_context_is_told():
    for told, given, used in ((None, "512", 512), (256, "512", 256), (1024, "512", 512), (256, None, 256)):
        models = {"object": "list", "data": [MODELS["data"][0] | {"max_model_len": told}]}
        replies = {"/v1/models": (200, models), "/tokenize": (200, {"count": 5})}
        with serving(lambda path, body, headers, replies=replies: replies[path]) as url, ExitStack() as resources:
            flags = [] if given is None else ["--max-model-len", given]
            target, _ = open_target(command.parse(["--url", url, *flags]), resources)
            assert target.max_model_len == used


def test_a_disk_that_is_full_is_said(capsys, target, tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.Journal, "append", full)
    assert command.main([*TWO, "--output", str(tmp_path / "run.jsonl")]) == 1
    assert "kvjax: cannot write: [Errno 28] No space left on device" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_unless_it_is_given(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert command.parse(["--url", "http://x"]).api_key == "from-environment"
    assert command.parse(["--url", "http://x", "--api-key", "given"]).api_key == "given"
