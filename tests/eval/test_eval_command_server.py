"""The same evaluation of a running server and of an engine in this process: every answer is the same."""

import json
import subprocess
import sys
import time

import pytest

from kvjax.eval import __main__ as command
from tests.end_to_end.server_process import ROOT, ServerProcess

# A server and two engines start, a dozen seconds each.
pytestmark = pytest.mark.slow

CONTEXT = "1280"
TASKS = ["mini/niah_single_2", "mini/niah_multiquery", "mini/turns_niah"]
TURNS = [1, 1, 5]
ASKED = ["--tasks", *TASKS, "--lengths", "192", "256", "--samples", "2", "--seed", "7"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", "--max-model-len", CONTEXT) as process:
        yield process.ready()
        assert process.terminate() == 0, process.log


def answers(path) -> dict[tuple, list[tuple]]:
    """What was said in each turn of each sample, and its score, without times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {
        (line["task"], line["length"], line["index"]): [
            line["score"],
            *[(t["text"], t["score"], t["finish"], t["prompt_tokens"], t["tokens"]) for t in line["turns"]],
        ]
        for line in lines
    }


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_a_server_and_an_engine_say_and_score_the_same(url, tmp_path, form, capsys):
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    flags = [*ASKED, "--form", form]
    assert command.main([*flags, "--max-model-len", CONTEXT, "--output", str(here), "--compile-cache", "none"]) == 0
    remote = [sys.executable, "-m", "kvjax.eval", "--url", url, *flags, "--output", str(there)]
    done = subprocess.run(remote, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert answers(here) == answers(there)
    assert len(answers(here)) == len(TASKS) * 2 * 2
    assert {task: len(said) - 1 for (task, _, _), said in answers(here).items()} == dict(zip(TASKS, TURNS, strict=True))
    # the two tables differ in their heading and in how fast it was
    table = capsys.readouterr().out.split("score x100")[1].split("median request")[0]
    assert table == done.stdout.split("score x100")[1].split("median request")[0]
    scores = [said[0] for said in answers(here).values()]
    assert max(scores) > 0.0


def test_a_server_that_is_killed_is_told_and_what_it_answered_stays(tmp_path):
    output = tmp_path / "run.jsonl"
    with ServerProcess(tmp_path / "log", "--max-model-len", "512") as process:
        url = process.ready()
        remote = [sys.executable, "-m", "kvjax.eval", "--url", url, "--tasks", "mini/vt", "--lengths", "256"]
        evaluation = subprocess.Popen(
            [*remote, "--samples", "100000", "--output", str(output)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with evaluation:
            while not output.exists() or len(output.read_bytes().splitlines()) < 4:
                assert evaluation.poll() is None, evaluation.communicate()
                time.sleep(0.05)
            process.kill()
            _, said = evaluation.communicate(timeout=120)
    assert evaluation.returncode == 1
    assert "samples failed and have no score" in said
    assert "samples were not evaluated" in said
    lines = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    assert [line["score"] is None for line in lines] == sorted(line["score"] is None for line in lines)
    assert sum(line["score"] is not None for line in lines) >= 3
    assert all(line["error"] for line in lines if line["score"] is None)
