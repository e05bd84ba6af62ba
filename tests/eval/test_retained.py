"""Spans of answers among tokens, and the share of them that layers retain."""

import io
import itertools

import numpy as np
import pytest
from rich.console import Console

from benchmarks.methods.__main__ import MODES, summarize
from benchmarks.methods.cell import Cell, cells
from benchmarks.methods.engines import Engines
from benchmarks.methods.table import agreement, difference, equal_pairs, equal_tables, tables
from kvjax.eval.command_target import small_model
from kvjax.eval.record import Record, Turn
from kvjax.eval.retained import Retained, masks, spans
from kvjax.eval.retained.plot import shades
from kvjax.eval.tasks import find_task

CHUNKS = ["The", " code", " for", " hen", " is", " 4", "71", "9", ".", " Then", " 47", "19", "0", " and", " 4719", "!"]


def found(*answers: str) -> list[tuple[int, int]]:
    tokens = range(len(CHUNKS))
    return [(s.start, s.stop) for s in spans(tokens, lambda ids: "".join(CHUNKS[i] for i in ids), answers)]


def test_an_answer_is_found_wherever_it_is_a_word_of_its_own():
    assert found("4719") == [(5, 8), (14, 15)]
    assert found("hen") == [(3, 4)]
    assert found("hen is", "Then") == [(3, 5), (9, 10)]
    assert found("") == found("719") == found("5") == []


def test_masks_hold_the_positions_that_are_kept():
    positions = (np.array([[0, 2, -1], [1, -1, -1]]), np.array([[3, 1, 2]]))
    first, second = masks(positions, 4)
    assert first.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert second.tolist() == [[False, True, True, True]]


def test_survival_is_the_share_of_the_answers_tokens():
    random = np.random.default_rng(0)
    layers = tuple(random.random((heads, 50)) < 0.4 for heads in (2, 4))
    retained = Retained("name", layers, 45, (range(3, 7), range(20, 21)))
    for index, layer in enumerate(layers):
        assert retained.survival(index) == pytest.approx((layer[:, 3:7].mean() + layer[:, 20].mean()) / 2)
    assert retained.share == pytest.approx((layers[0].sum() + layers[1].sum()) / 300)
    assert Retained("name", layers, 45).survival(0) is None


@pytest.mark.parametrize("columns", [1, 7, 50, 80])
def test_cells_are_means_of_the_tokens_they_stand_for(columns):
    layers = (np.random.default_rng(1).random((3, 50)) < 0.5,)
    binned = Retained("name", layers, 45).binned(columns)
    assert binned.shape == (3, min(columns, 50))
    edges = np.linspace(0, 50, binned.shape[1] + 1).astype(int)
    for column, (start, stop) in enumerate(itertools.pairwise(edges)):
        np.testing.assert_allclose(binned[:, column], layers[0][:, start:stop].mean(axis=1))


def test_shades_go_from_one_colour_to_the_other():
    made = shades(np.array([0.0, 0.5, 1.0]), "#000000", "#ff0000")
    np.testing.assert_allclose(made, [[0, 0, 0], [0.5, 0, 0], [1, 0, 0]])


def row(arm: str, budget: int | None, says: list[str], refused: str | None = None) -> dict:
    """A row of the table of methods: what was said, right where it is 'yes', and failed where it is empty."""
    if refused:
        return {"arm": arm, "budget": budget, "length": 64, "refused": refused}
    task = find_task("mini/vt")
    records = []
    for index, said in enumerate(says):
        turns = (Turn("?", ("yes",), said, 1.0, "stop", 9, 1, 0.1, 0.2),) if said else ()
        score, error = (float(said == "yes"), None) if said else (None, "broke")
        records.append(Record(task.name, 64, index, score, error, turns))
    modes = {mode.name: summarize(records, [task]) for mode in MODES}
    return {
        "arm": arm, "budget": budget, "length": 64, "refused": None, "full": 4096, "kept": 2048, "read": 1024,
        "modes": modes,
    }  # fmt: skip


def test_every_arm_has_its_budgets_and_a_length_is_done_before_the_next():
    made = cells(["full", "quest"], [16, 32], [64, 128])
    assert made[:3] == [Cell("full", None, 64), Cell("quest", 16, 64), Cell("quest", 32, 64)]
    assert [cell.length for cell in made] == [64] * 3 + [128] * 3


def test_agreement_counts_samples_that_both_answered():
    full = row("full", None, ["yes", "no", "yes", ""])
    assert agreement(row("quest", 16, ["yes", "maybe", "", "yes"]), full, "aware") == 0.5
    assert agreement(row("quest", 16, [""] * 4), full, "aware") is None


def test_refused_budgets_are_dashes_with_the_reason_below():
    console = Console(width=300, record=True, file=io.StringIO())
    rows = [row("full", None, ["yes", "no"]), row("snapkv", 16, [], refused="too small"), row("quest", 16, ["yes", ""])]
    for part in tables(rows):
        console.print(part)
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    held = ["2", "KiB", "50%", "1", "KiB", "25%"]
    assert ["full", *held, *["50.0", "9-91"] * 2] in lines
    assert ["quest", "16", *held, "100.0", "21-100", "1", "failed", "100.0", "21-100"] in lines
    assert ["snapkv", "16", *["-"] * 4] in lines
    assert "- snapkv 16 at 64: too small" in text
    assert "- quest 16 at 64: broke" in text


def test_differences_are_those_of_the_samples_that_both_answered():
    ours, theirs = (
        row("rocketkv", 16, ["yes", "yes", "no", "yes", ""]),
        row("full", None, ["yes", "no", "no", "", "yes"]),
    )
    found = difference(ours, theirs, "aware")
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(1 / 3)
    assert low == 0.0
    assert mean < high <= 1.0
    assert difference(theirs, ours, "aware") == pytest.approx((-mean, -high, -low))
    assert difference(ours, row("full", None, [""] * 5), "aware") is None


def test_whole_pages_are_compared_where_they_read_no_more():
    faithful = row("rocketkv-faithful", 16, ["no", "no"]) | {"read": 2048}
    paged = [row("rocketkv", budget, ["yes", "yes"]) | {"read": 128 * budget} for budget in (8, 15, 16, 17)]
    [(published, ours)] = equal_pairs([faithful, *paged, row("rocketkv", 15, []) | {"length": 128}])
    assert (published["budget"], ours["budget"]) == (16, 16)
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(*equal_tables([faithful, *paged]))
    [line] = [line.split() for line in console.export_text().splitlines() if line.split()[:1] == ["64"]]
    assert line == ["64", "16", "2", "KiB", "16", "2", "KiB", *["+100.0", "+100.0", "to", "+100.0"] * 4]
    refused = row("rocketkv-faithful", 16, [], refused="too small")
    assert not list(equal_tables([refused, *paged]))


@pytest.mark.parametrize("budget", [32, 64, 128])
def test_equal_bytes_are_the_most_that_are_no_more(budget):
    engines = Engines(small_model(), headroom=64, slots=2)
    published = engines.caches(Cell("rocketkv-faithful", budget, 1024)).read_bytes(1024)
    cell = engines.equal(Cell("rocketkv-faithful", budget, 1024))
    assert cell is not None
    assert cell.budget is not None
    assert 0.9 * published <= engines.caches(cell).read_bytes(1024) <= published
    assert engines.caches(Cell("rocketkv", cell.budget + 1, 1024)).read_bytes(1024) > published


def test_an_engine_measures_all_budgets_that_it_has_the_plans_of():
    """Where pages or head dims follow the budget each has an engine of its own, and so has what is refused."""
    engines = Engines(small_model(), headroom=64, slots=2)
    arms = ["full", "snapkv", "rocketkv-stage2", "topk", "rocketkv-faithful"]
    found = engines.shared(cells(arms, [32, 64, 1 << 20, 48], [1024]))
    assert [[cell.budget for cell in served] for served in found if served[0].arm == "snapkv"] == [
        [32, 64, 48],
        [1 << 20],
    ]
    assert [[cell.budget for cell in served] for served in found if served[0].arm == "full"] == [[None]]
    assert all(len(served) == 1 for served in found if served[0].arm.startswith("rocketkv"))
    assert sorted(map(str, itertools.chain(*found))) == sorted(map(str, cells(arms, [32, 64, 1 << 20, 48], [1024])))
