"""Pictures of a search show its numbers: what is drawn is read back from the figures."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from kvjax.search.allocators.greedy import Greedy
from kvjax.search.outcome import FULL
from kvjax.search.report import plots
from kvjax.search.report.figure import BASE, BODY, MARKERS
from kvjax.search.result import SearchResult
from tests.search.result import search_result

ONE = [plots.budgets, plots.convergence, plots.generations]
SEVERAL = [plots.pareto, plots.table]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labelled(axes, label):
    [found] = [line for line in axes.lines if line.get_label() == label]
    return found


def luminance(colour):
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def same(one, other):
    return one._repr_png_() == other._repr_png_()


@pytest.mark.parametrize("sliding", [False, True])
def test_a_bar_is_what_its_layer_keeps(sliding):
    result = search_result(sliding=sliding)
    [axes] = plots.budgets(result).axes
    heights, feet = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert tuple(heights) == result.chosen.candidate
    assert set(feet) == {result.config.window + result.config.sinks}
    assert tuple(labelled(axes, "uniform").get_ydata()) == (64,) * 8
    assert sum(labelled(axes, "pyramid").get_ydata()) == 512
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(2 * i if sliding else i) for i in range(8)]
    assert axes.get_title("left") == "512 tokens in 8 layers: mean 64"


def test_a_mean_that_is_no_whole_number_is_not_rounded_to_one():
    result = search_result()
    retained = (*(result.chosen.candidate or ())[:-1], 30)
    picture = plots.budgets(dataclasses.replace(result, chosen=dataclasses.replace(result.chosen, candidate=retained)))
    assert picture.axes[0].get_title("left") == f"{sum(retained)} tokens in 8 layers: mean {sum(retained) / 8:.3f}"


def test_every_scheme_that_was_judged_is_a_dot_under_the_best_so_far():
    result = search_result()
    [axes] = plots.convergence(result).axes
    dots = labelled(axes, "a candidate")
    scores = np.concatenate([generation.score for generation in result.history])
    np.testing.assert_allclose(dots.get_ydata(), 100 * scores)
    best = np.asarray(labelled(axes, "best so far").get_ydata())
    assert (np.diff(best) >= 0).all()
    assert best[-1] == 100 * scores.max()
    assert (best[:-1] >= dots.get_ydata()).all()
    lines = {line.get_ydata()[0] for line in axes.lines if line.get_xdata()[0] == 0 and len(line.get_xdata()) == 2}
    assert lines == {100 * each.search.mean for each in result.outcomes if each.name != "evolution"}
    assert ", ".join(texts(axes)).split(", ").count(FULL) == 1


def test_what_costs_more_than_the_budget_is_hollow_and_never_the_best():
    result = search_result(allocator=Greedy())
    [axes] = plots.convergence(result).axes
    [own] = labelled(axes, "a candidate").get_ydata()
    assert len(labelled(axes, "costs more").get_ydata()) == 48
    assert max(labelled(axes, "costs more").get_ydata()) > own
    assert set(labelled(axes, "best so far").get_ydata()) == {own}


def test_names_of_equal_scores_share_a_line_and_no_two_overlap():
    result = search_result(layers=40)
    picture = plots.convergence(result)
    picture.canvas.draw()
    boxes = sorted((text.get_window_extent().y0, text.get_window_extent().y1) for text in picture.axes[0].texts)
    assert all(below[1] <= above[0] + 1 for below, above in itertools.pairwise(boxes))


def test_a_column_is_the_mean_scheme_of_its_generation():
    result = search_result()
    heat, spread = plots.generations(result).axes[:2]
    [image] = heat.images
    for column, generation in zip(np.asarray(image.get_array()).T, result.history, strict=True):
        np.testing.assert_allclose(column, generation.candidates.mean(axis=0))
        assert column.sum() == pytest.approx(512)
    np.testing.assert_allclose(spread.lines[0].get_ydata(), [generation.spread for generation in result.history])
    assert plots.generations(search_result(allocator=Greedy())).axes[0].images[0].get_clim()[1] < 200  # not 480


def test_a_search_that_judged_nothing_is_drawn_as_such():
    empty = dataclasses.replace(search_result(), history=())
    assert texts(plots.generations(empty).axes[0]) == ["nothing was evaluated"]
    assert not [line for line in plots.convergence(empty).axes[0].lines if line.get_label() == "best so far"]


def test_nothing_lies_above_the_front_and_bytes_are_those_of_the_profile():
    results = [search_result(mean) for mean in (128, 32, 64)]
    axes = plots.pareto(results).axes[0]
    cost, score = (np.asarray(values) for values in labelled(axes, "Pareto front").get_data())
    assert list(cost[:-1]) == sorted(set(cost[:-1]))
    assert (np.diff(score[:-1]) > 0).all()
    for result in results:
        at = score[:-1][cost[:-1] <= result.config.token_budget].max()
        assert at >= max(100 * each.test.mean for each in result.outcomes if each.candidate is not None)
    full = labelled(axes, FULL).get_ydata()[0]
    assert full == 100 * next(each for each in results[0].outcomes if each.name == FULL).test.mean
    [top] = axes.child_axes
    for result, said in zip(sorted(results, key=lambda r: r.config.token_budget), top.get_xticklabels(), strict=True):
        profile, model = result.profile, result.model
        headroom = dataclasses.replace(result.config, headroom=1)
        budgets = dataclasses.replace(result, config=headroom).profile.layers
        spent = sum(each.nbytes(model.kv_heads, model.head_dim, "bfloat16") for each in budgets)
        one = 2 * 2 * model.kv_heads * model.head_dim
        assert int(said.get_text()) * 1024 == spent - one * len(profile.layers)


def test_one_search_has_a_front_over_all_its_budgets():
    result = search_result()
    axes = plots.pareto(result.sweep).axes[0]
    assert axes.get_xticks().tolist() == [64, 128]
    score = labelled(axes, "Pareto front").get_ydata()
    assert score[0] == max(100 * each.test.mean for each in result.outcomes if each.candidate is not None)
    doubled = [100 * each.test.mean for each in result.expanded[128]]
    assert max(doubled) > score[0]
    assert max(doubled) in score


@pytest.mark.parametrize(
    ("field", "value"), [("tasks", ("mini/vt",)), ("length", 512), ("test", 64), ("query_aware", True)]
)
def test_a_front_of_unlike_searches_is_refused(field, value):
    other = search_result(32)
    other = dataclasses.replace(other, config=dataclasses.replace(other.config, **{field: value}))
    with pytest.raises(ValueError, match=f"different {field}"):
        plots.pareto([search_result(), other])


@pytest.mark.parametrize("draw", SEVERAL)
def test_no_results_are_refused(draw):
    with pytest.raises(ValueError, match="no results"):
        draw([])


def test_the_table_has_every_score_and_marks_the_best_that_is_compressed():
    results = [search_result(mean) for mean in (64, 128)]
    [axes] = plots.table(results).axes
    written = texts(axes)
    for result in results:
        for outcome in result.outcomes:
            assert f"{100 * outcome.test.mean:.1f}" in written
    bold = [text.get_text() for text in axes.texts if text.get_fontweight() == "bold"]
    assert bold == [
        f"{100 * max(each.test.mean for each in result.outcomes if each.candidate is not None):.1f}"
        for result in results
    ]


@pytest.mark.parametrize("draw", ONE)
def test_a_result_that_was_written_and_read_gives_the_same_picture(draw):
    result = search_result()
    assert same(draw(SearchResult.from_json(result.to_json())), draw(result))


def test_a_result_that_was_written_and_read_compares_the_same():
    results = [search_result(mean) for mean in (64, 128)]
    again = [SearchResult.from_json(result.to_json()) for result in results]
    assert all(same(draw(again), draw(results)) for draw in SEVERAL)


def test_a_figure_is_written_as_a_png(tmp_path):
    result = search_result()
    for name, picture in (("b", plots.budgets(result)), ("c", plots.convergence(result))):
        picture.savefig(tmp_path / f"{name}.png")
        assert imread(tmp_path / f"{name}.png").std() > 0.05
    assert same(plots.generations(result), plots.generations(result))


def test_colours_and_markers_can_be_told_in_grayscale():
    assert luminance(BODY) - luminance(BASE) > 0.25
    assert len(set(MARKERS.values())) == len(MARKERS)


def test_a_result_needs_no_matplotlib_and_pictures_need_no_pyplot():
    code = (
        "import sys, kvjax.search.result; assert 'matplotlib' not in sys.modules;"
        "import kvjax.search.report.plots; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
