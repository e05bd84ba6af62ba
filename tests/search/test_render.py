"""The view of a notebook and the tables of a terminal say what was found, and how sure it is."""

import dataclasses
import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from kvjax.search.report.render import gain, gap, html, svg
from kvjax.search.report.tables import outcomes, table
from kvjax.search.result import SearchResult
from tests.search.result import search_result

XMLNS = "{http://www.w3.org/2000/svg}"


def rendered(shown, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def with_gain(result, *numbers):
    return dataclasses.replace(result, chosen=dataclasses.replace(result.chosen, gain=numbers))


def test_the_view_holds_the_score_its_interval_the_gain_and_the_gap():
    result = search_result()
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html(result)))
    test, points = result.chosen.test, 100 * result.chosen.gain[0]
    assert f"{100 * test.mean:.1f}% exact replies ({100 * test.low:.1f} to {100 * test.high:.1f})" in text
    assert f"{points:+.1f} (" in text
    assert f"flatters it by {100 * result.chosen.calibration_gap:.1f} points" in text
    for outcome in result.outcomes:
        row = f"{outcome.name} {100 * outcome.search.mean:.1f} {100 * outcome.selection.mean:.1f} "
        assert row + f"{100 * outcome.test.mean:.1f}" in text
    assert result._repr_html_() == html(result)


def test_the_view_survives_a_file():
    result = search_result()
    assert html(SearchResult.from_json(result.to_json())) == html(result)


def test_the_view_runs_nothing_that_a_name_brings():
    result = search_result()
    config = dataclasses.replace(result.config, tasks=("x/<script>alert(1)</script>",))
    view = html(dataclasses.replace(result, config=config, chosen=dataclasses.replace(result.chosen, name="<b>")))
    assert "<script" not in view
    assert "&lt;b&gt;" in view


@pytest.mark.parametrize(("layers", "sliding"), [(8, False), (8, True), (40, False)])
def test_bars_are_as_tall_as_layers_keep_tokens(layers, sliding):
    result = search_result(layers=layers, sliding=sliding)
    drawing = ElementTree.fromstring(svg(result))
    retained = result.chosen.candidate or ()
    heights = [float(group[1].attrib["height"]) for group in drawing.iter(f"{XMLNS}g")]
    assert heights == [pytest.approx(96 * tokens / max(retained), abs=0.06) for tokens in retained]
    titles = [title.text for title in drawing.iter(f"{XMLNS}title")]
    assert titles == [f"layer {(1 + sliding) * i}: {tokens} tokens" for i, tokens in enumerate(retained)]
    assert "mean 64" in [text.text for text in drawing.iter(f"{XMLNS}text")]


def test_a_gain_that_may_be_chance_is_called_so():
    result = search_result()
    assert "chance" not in gain(with_gain(result, 0.05, 0.01, 0.09))
    assert "chance" in gain(with_gain(result, 0.05, -0.01, 0.11))
    assert "+5.0 (-1.0 to +11.0)" in gain(with_gain(result, 0.05, -0.01, 0.11))
    uniform = next(each for each in result.outcomes if each.name == "uniform")
    assert "Nothing did better" in gain(dataclasses.replace(result, chosen=uniform))


def test_a_gap_is_told_whether_it_flatters_or_not():
    chosen = search_result().chosen
    assert "flatters it by" in gap(chosen)
    assert "does not flatter" in gap(dataclasses.replace(chosen, search=chosen.test))


def test_the_table_of_one_search_fits_a_terminal():
    result = search_result()
    text = rendered(outcomes(result), 80)
    assert "…" not in text
    for outcome in result.outcomes:
        [row] = [line for line in text.splitlines() if line.strip().startswith(outcome.name + " ")]
        assert f"{100 * outcome.test.mean:.1f}" in row


def test_the_widest_numbers_fit_a_terminal_too():
    result = search_result()
    wide = dataclasses.replace(result.outcome("inverse-pyramid"), gain=(-0.999, -1.0, -0.985), evaluations=12_345)
    text = rendered(outcomes(dataclasses.replace(result, outcomes=(*result.outcomes, wide))), 80)
    assert "-99.9 (-100 to -98)" in text
    assert "12,345" in text


def test_the_table_of_searches_has_a_row_each_and_a_column_an_allocator():
    results = [search_result(mean) for mean in (64, 128)]
    shown = table(results)
    assert [str(column.header).replace("\n", "") for column in shown.columns[1:]] == [
        outcome.name for outcome in results[0].outcomes
    ]
    lines = rendered(shown, 100).splitlines()
    for result in results:
        at = next(index for index, line in enumerate(lines) if f" {result.config.token_budget} kept" in line)
        assert lines[at - 1].split()[-6:] == [f"{100 * outcome.test.mean:.1f}" for outcome in result.outcomes]
        assert [part.partition("-")[0] for part in lines[at].split()[-6:]] == [
            f"{100 * outcome.test.low:.0f}" for outcome in result.outcomes
        ]
    with pytest.raises(ValueError, match="no results"):
        table([])
