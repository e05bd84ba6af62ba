"""`python -m benchmarks.store` at toy sizes: in slices, of which none is measured twice."""

import json

import pytest

from benchmarks import store

ASKED = ["--quick", "--lengths", "960", "--parts", "tiers", "device"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "store.json"


def rows(output) -> dict[str, dict]:
    return {row["part"]: row for row in json.loads(output.read_text())["rows"]}


def test_parts_are_written_one_by_one_and_measured_once(output, monkeypatch, capsys):
    def killed(plan, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(store.PARTS, "device", killed)
        with pytest.raises(KeyboardInterrupt):
            store.main([*ASKED, "--output", str(output)])
    assert set(first := rows(output)) == {"tiers"}
    capsys.readouterr()
    monkeypatch.setitem(store.PARTS, "tiers", killed)  # it is there already
    assert store.main([*ASKED, "--output", str(output)]) == 0
    assert f"tiers     is in {output} already" in (out := capsys.readouterr().out)
    both = rows(output)
    assert both["tiers"] == first["tiers"]
    rates = both["device"]["gigabytes_per_second"]
    step = both["device"]["step"]
    assert both["device"]["tokens"] == 959 // step * step  # all but the last token, in whole units
    assert all(rate > 0 for rate in rates.values())
    plain = max(rates["device_put groups"], rates["device_put chunks"])
    assert both["device"]["share"] == pytest.approx(rates["restored"] / plain)
    assert f"{both['device']['share']:.2f} of it" in out


def test_results_of_other_sizes_are_not_joined(output, capsys):
    assert store.main(["--quick", "--parts", "tiers", "--output", str(output)]) == 0
    before = output.read_text()
    assert store.main(["--quick", "--rounds", "2", "--parts", "tiers", "--output", str(output)]) == 2
    assert "rounds was 1 and now is 2" in capsys.readouterr().err
    assert output.read_text() == before


@pytest.mark.slow(reason="three engines compile")
def test_prompts_again_and_together(output, capsys):
    assert store.main(["--quick", "--parts", "again", "together", "--output", str(output)]) == 0
    printed, found = capsys.readouterr().out, rows(output)
    assert [line.split()[0] for line in printed.splitlines()] == ["again", "together", "together", "together"]
    [row] = found["again"]["rows"]
    same = 1535 // row["step"] * row["step"]  # all but the last token, in whole units
    assert row["cached"] == {
        "cold": [0],
        "host": [same],
        "disk": [same],
        "host further": [1536],
        "disk further": [1536],
    }
    equal, sharing = found["together"]["rows"]
    step = found["together"]["step"]
    assert sorted(equal["cached"]) == [0, *[1299 // step * step] * 7]
    assert sorted(sharing["cached"]) == [0, *[1024] * 31]
    for each in (equal, sharing):
        assert each["computed"] == each["tokens"] - sum(each["cached"])


@pytest.mark.slow(reason="eight engines compile")
def test_every_part_says_what_it_measured(output, capsys):
    asked = ["warm", "curve", "documents", "overhead", "restart"]
    assert store.main(["--quick", "--parts", *asked, "--output", str(output)]) == 0
    printed, found = capsys.readouterr().out, rows(output)
    assert set(found) == set(asked)
    assert [line.split()[0] for line in printed.splitlines()] == ["warm", "curve", "curve", *asked[2:]]
    [warm] = found["warm"]["rows"]
    assert warm["cached"] == [(cached := 1535 // warm["step"] * warm["step"])] * 2
    assert [row["r"] for row in found["curve"]["rows"]] == [1, 10]
    assert all(row["share"] > 0 for row in found["curve"]["rows"])
    assert set(found["documents"]["less"]) == {"ttft_s", "round_s"}
    assert set(found["overhead"]["clock_more"]) == {"host", "disk"}
    assert 0 < found["overhead"]["cpu_share"]["host"] < 1
    assert 0 < found["overhead"]["cpu_share"]["disk"] < 1
    assert found["restart"]["cached"] == cached
    assert found["restart"]["ready_s"] > found["restart"]["store_s"] > 0
