"""The table of what searched budgets are worth, on a task small enough to search in seconds."""

import json

import pytest

from benchmarks import budgets


@pytest.mark.slow  # two searches, and three engines start
def test_the_table_pairs_both_modes_with_what_costs_the_same(tmp_path, capsys):
    output = tmp_path / "table.json"
    small = ["--tasks", "needles", "--token-budgets", "32", "--length", "160", "--evaluations", "60", "--samples", "8"]
    command = [*small, "--runs", str(tmp_path / "runs"), "--output", str(output), "--plots", str(tmp_path / "plots")]
    budgets.main(command)
    row, measured = json.loads(output.read_text())["rows"]
    outcomes = {each["name"]: each for each in row["project"]["outcomes"]}
    assert {"uniform", "pyramid", "inverse-pyramid", "entropy", "streaming", "full cache"} < set(outcomes)
    evaluated = {outcomes[name]["evaluations"] for name in ("evolution", "random", "fine-greedy")}
    assert max(evaluated) - min(evaluated) < 20  # a generation of ten, and a size of each layer
    for mode in ("project", "paper"):
        cell = row["verdict"][mode]
        assert cell["over_uniform"][0] == pytest.approx(cell["test"]["mean"] - outcomes["uniform"]["test"]["mean"])
        assert cell["over_best_heuristic"][0] <= cell["over_uniform"][0]
        assert cell["evaluations"] >= 60
    assert measured["ratio"] > 1
    assert measured["kv_bytes_of_a_sequence_found"] == measured["kv_bytes_as_the_profile_says_found"]
    assert measured["kv_bytes_of_a_sequence_uniform"] < measured["kv_bytes_of_a_sequence_full_cache"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"table.png", "needles.png"}
    first = capsys.readouterr().out
    budgets.main(command)  # what was found is not searched again
    assert capsys.readouterr().out.split("candidates")[0] == first.split("candidates")[0]
