"""`python -m benchmarks.store_faults` with tiny numbers: one table, and a status that says whether all was right."""

import json

import numpy as np
import pytest

from benchmarks import store_faults
from benchmarks.store_faults import Outcome
from tests.store.chains import blob_of, names_of


@pytest.mark.heavy
def test_every_part_has_a_line_and_nothing_is_wrong(tmp_path, capsys):
    output = tmp_path / "faults.json"
    assert store_faults.main(["--quick", "--kills", "2", "--output", str(output)]) == 0
    rows = {row["part"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["kills", "processes", "redis", "locks"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
    for part, row in rows.items():
        assert (row["wrong"], row["over"]) == (0, 0)
        if "skipped" not in row["often"]:
            assert row["proven"] > 0, part
            assert row["longest"] > 0


@pytest.mark.parametrize(("field", "status"), [("wrong", 1), ("over", 1), ("proven", 0)])
def test_the_status_says_whether_anything_was_wrong(monkeypatch, field, status):
    def part(kills, seconds, folder):
        return Outcome("part", "nothing", **{field: 1})

    monkeypatch.setattr(store_faults, "PARTS", (part,))
    assert store_faults.main([]) == status


def test_a_block_of_another_key_is_wrong():
    first, second = names_of(2)
    outcome = Outcome("", "")
    outcome.prove(blob_of(first), first)
    outcome.prove(blob_of(first), second)
    outcome.prove(np.zeros_like(blob_of(first)), first)
    assert (outcome.proven, outcome.wrong) == (1, 2)
