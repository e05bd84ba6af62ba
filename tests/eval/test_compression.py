"""A compressed engine as a target: what a method knows when it chooses decides which answers are left."""

import json

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from benchmarks.methods import __main__ as methods
from benchmarks.methods import engines
from benchmarks.model_card import induction
from kvjax.engine import EngineConfig
from kvjax.eval import __main__ as command
from kvjax.eval.retained import Retained
from kvjax.eval.retained.plot import FOUND, LOST, plot
from kvjax.eval.retained.render import drawing
from kvjax.eval.runner import Case, Conduct, evaluate
from kvjax.eval.targets import Footprint
from kvjax.eval.targets.engine import EngineTarget
from kvjax.eval.tasks import TASKS
from tests.eval.recall import BUDGET, LENGTH, ROOM, SIZES, Recall

pytestmark = pytest.mark.heavy

CONFIG = EngineConfig(
    max_model_len=LENGTH + 32, max_num_seqs=2, method="rocketkv-stage1", token_budget=BUDGET, headroom=ROOM
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("induction")
    induction.write(SIZES, folder)
    return folder


@pytest.fixture(scope="module")
def target(folder):
    target = EngineTarget.from_pretrained(folder, CONFIG)
    with target.engine:
        yield target
        target.engine.check_integrity()


def scores(target, conduct: Conduct, turns: int = 1) -> list[list[float]]:
    """Of each turn of each of three samples."""
    records = evaluate(target, [Case(Recall(turns=turns), LENGTH, index) for index in range(3)], conduct)
    assert all(record.error is None for record in records)
    return [[turn.score for turn in record.turns] for record in records]


def test_a_question_in_sight_finds_its_needle_and_a_hidden_one_does_not(target):
    assert scores(target, Conduct(concurrency=2)) == [[1.0]] * 3
    assert scores(target, Conduct(concurrency=2, query_agnostic=True)) == [[0.0]] * 3


def test_each_turn_chooses_anew_unless_what_was_dropped_is_gone(target):
    assert scores(target, Conduct(concurrency=2), turns=2) == [[1.0, 1.0]] * 3
    assert scores(target, Conduct(concurrency=2, evict=True), turns=2) == [[1.0, 0.0]] * 3
    assert scores(target, Conduct(concurrency=2, query_agnostic=True), turns=2) == [[0.0, 0.0]] * 3


def test_the_layer_that_needs_the_needle_keeps_it(target):
    retained = Retained.observe(target, Case(Recall(turns=2), LENGTH, 0), Conduct())
    assert retained.length == LENGTH - 8 + 2
    assert retained.question == LENGTH - 8
    assert [(span.start, len(span)) for span in (*retained.answers, *retained.later)] == [(154, 1), (77, 1)]
    assert [retained.survival(layer) for layer in (0, 1)] == [0.0, 1.0]
    assert not any(layer[:, 77].any() for layer in retained.layers)  # nobody has asked for it yet
    assert retained.share == pytest.approx(BUDGET / retained.length)
    hidden = Retained.observe(target, Case(Recall(), LENGTH, 0), Conduct(query_agnostic=True))
    assert [hidden.survival(layer) for layer in (0, 1)] == [0.0, 0.0]
    # the question came later, through the views: nothing of it is missing
    assert all(layer[:, hidden.question :].all() for layer in hidden.layers)


def test_the_picture_and_the_lines_show_it(target, tmp_path):
    retained = Retained.observe(target, Case(Recall(turns=2), LENGTH, 0), Conduct())
    plot([retained, retained], "two", tmp_path / "kept.png")
    pixels = (imread(tmp_path / "kept.png")[..., :3] * 255).round().astype(int)
    for colour in (FOUND, LOST):
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=-1) <= 1).sum() > 100
    title, places, *layers = (line.plain for line in drawing(retained, 80))
    assert title == f"recall: {retained.length} tokens, {BUDGET / retained.length:.0%} kept"
    assert [len(line) for line in (places, *layers)] == [80] * 3
    needle = places.index("▼")
    assert [line[needle] for line in layers] == ["x", "█"]
    assert [line.split()[-1] for line in layers] == ["0%", "100%"]


def test_the_command_tells_bytes_and_draws_in_the_terminal_or_in_a_file(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_target", lambda given, resources: (target, lambda: None))
    monkeypatch.setitem(TASKS, "recall", Recall())
    asked = ["--tasks", "recall", "--lengths", "128", str(LENGTH), "--samples", "1"]
    assert command.main([*asked, "--show-retained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = f"  induction0, rocketkv-stage1 of {BUDGET} tokens  completion, greedy, 1 samples a cell"
    assert lines[1].replace(target.engine.model_name, "induction0") == head
    [first, second] = [line for line in lines if " read a step " in line]
    assert first == "  compressed cache  128  384 KiB kept of 512 KiB (75%), 384 KiB read a step (75%)"
    assert second.split()[0] == str(LENGTH)
    at = lines.index(f"recall: {LENGTH - 6} tokens, 38% kept")  # the longer one
    assert [line.split()[-1] for line in lines[at + 1 : at + 4]] == ["kept", "0%", "100%"]
    picture = tmp_path / "kept.png"
    assert command.main([*asked, "--query-agnostic", "--json", "--show-retained", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["query_agnostic"] is True
    assert f"drawn in {picture}" in err
    assert picture.stat().st_size > 10_000


def test_bytes_are_those_of_the_views(target):
    entry = 2 * 128 * 4 * 2 * 2  # K and V of 128 numbers in float32, 2 heads, 2 layers
    assert target.footprint(LENGTH) == Footprint(BUDGET * entry, BUDGET * entry, LENGTH * entry)


def test_results_of_another_compression_are_another_identity(folder, tmp_path):
    def identity(**settings) -> dict:
        settings = {"max_model_len": 256, **settings}
        return dict(EngineTarget.from_pretrained(folder, EngineConfig(**settings)).identity)

    full = identity()
    assert full == identity(method="full") == identity(max_model_len=128)
    assert set(full) == {"model", "files", "dtype"}
    changed = [{}, {"method": "snapkv"}, {"token_budget": 64}, {"headroom": 32}, {"max_model_len": 128}]
    others = [identity(**{"method": "streaming", "token_budget": 48, **settings}) for settings in changed]
    assert len({tuple(sorted(other.items())) for other in others}) == len(others)
    assert others[0] == full | {"method": "streaming", "token_budget": "48", "headroom": "128", "max_model_len": "256"}


def test_the_table_of_methods_has_all_ways_of_asking(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "recall", Recall())
    monkeypatch.setitem(TASKS, "recall_turns", Recall("recall_turns", turns=2))
    monkeypatch.setattr(engines, "MARGIN", 32)
    output = tmp_path / "methods.json"
    asked = ["--model", str(folder), "--output", str(output), "--lengths", str(LENGTH), "--samples", "2"]
    asked += ["--tasks", "recall", "--turns", "recall_turns", "--headroom", str(ROOM), "--concurrency", "2"]
    asked += ["--arms", "rocketkv-stage1", "--budgets", "16", str(BUDGET), "--compile-cache", "none"]
    assert methods.main(asked) == 0
    first = capsys.readouterr().out
    refused, row = methods.known_rows(output, settings := methods.settings_of(methods.build_parser().parse_args(asked)))
    assert "raise the budget" in methods.known_rows(output, settings)[refused]["refused"]
    modes = methods.known_rows(output, settings)[row]["modes"]
    assert {name: mode["mean"] for name, mode in modes.items()} == {
        "aware": 1.0, "agnostic": 0.0, "anew": 1.0, "evicted": 0.5,
    }  # fmt: skip
    assert "2/2  rocketkv-stage1 96 at 256: aware 100.0, agnostic 0.0, anew 100.0, evicted 50.0" in first
    monkeypatch.setattr(methods, "measure", None)  # nothing is left to measure
    assert methods.main(asked) == 0
    again = capsys.readouterr().out
    assert again.startswith("2 of 2 cells are in ")
    assert again.split("\n\n", 1)[1:] == first.split("\n\n", 1)[1:]
    assert methods.main([*asked, "--samples", "3"]) == 2
    assert "samples was 2 and now is 3" in capsys.readouterr().err


def test_neither_a_shared_store_nor_a_shared_engine_changes_a_row(folder, tmp_path, monkeypatch):
    """The last cell finds its prompts read by another method, in an engine of a larger budget."""
    monkeypatch.setitem(TASKS, "recall", Recall())
    monkeypatch.setitem(TASKS, "recall_turns", Recall("recall_turns", turns=2))

    def row(*options: str) -> dict:
        output = tmp_path / f"{options[-1]}.json"
        asked = ["--model", str(folder), "--output", str(output), "--lengths", "400", "--samples", "2", *options]
        asked += ["--tasks", "recall", "--turns", "recall_turns", "--headroom", str(ROOM), "--compile-cache", "none"]
        assert methods.main(asked) == 0
        rows = methods.known_rows(output, methods.settings_of(methods.build_parser().parse_args(asked)))
        return rows[methods.Cell("rocketkv-stage1", BUDGET, 400)]

    shared = row("--arms", "streaming", "rocketkv-stage1", "--budgets", "128", str(BUDGET))
    alone = row("--arms", "rocketkv-stage1", "--budgets", str(BUDGET), "--store", "none")
    # a block, or the last of the units of 64 or 16 that the start has seen to agree
    reused = shared.pop("reused")
    assert any(reused == pytest.approx(tokens / 396, abs=0.01) for tokens in (256, 320, 352))
    assert alone.pop("reused") == 0.0
    assert shared.pop("seconds") * alone.pop("seconds") > 0
    assert shared == alone
    assert [mode["mean"] for mode in alone["modes"].values()] == [1.0, 0.0, 1.0, 0.5]


def test_a_command_shows_what_is_kept(folder, tmp_path):
    """Lines of a terminal that is too narrow are not wrapped."""
    console = Console(width=40, record=True, force_terminal=False)
    layers = (np.ones((2, 100), bool), np.zeros((2, 100), bool))
    console.print(*drawing(Retained("name", layers, 90, (range(50, 60),)), 40), sep="\n")
    assert {len(line) for line in console.export_text().splitlines()[1:]} == {40}
