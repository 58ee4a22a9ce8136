"""The figures, read back from matplotlib's objects: the marks, their places and their looks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ebbline.analysis.figures.before_after import before_after_caption, before_after_figure
from ebbline.analysis.figures.defences import defences_caption
from ebbline.analysis.figures.drawing import (
    MOST_LOOKS,
    SEEDS,
    SEEDS_NOTE,
    Page,
    error_bar,
    looks,
    save,
    save_for_print,
    svg,
)
from ebbline.analysis.figures.frontier import RING, frontier_caption, frontier_figure
from ebbline.analysis.figures.knob import threshold_caption, threshold_figure
from ebbline.analysis.figures.words import frontier_words
from ebbline.analysis.results.before_after import Line
from ebbline.analysis.results.measurements import Baselines
from ebbline.sweeps.study.points import Point, Result
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import OVER, REFUSAL, TASK, failed, result

OBJECTIVES = (REFUSAL, TASK)


def markers(axes: Axes, shape: str | None = None) -> list[tuple[float, float, bool]]:
    """(x, y, filled) of everything drawn with an interval."""
    lines = [drawn.lines[0] for drawn in axes.containers if isinstance(drawn, ErrorbarContainer)]
    kept = [
        line
        for line in lines
        if isinstance(line, Line2D) and (shape is None or line.get_marker() == shape)
    ]
    return [
        (float(x), float(y), line.get_markerfacecolor() != "white")
        for line in kept
        for x, y in np.asarray(line.get_xydata(), dtype=np.float64)
    ]


def plain_dots(axes: Axes) -> int:
    """How many points are drawn without an interval."""
    return sum(len(line.get_xydata()) for line in axes.lines if line.get_rasterized())


def test_every_finished_point_is_drawn_exactly_at_its_values(results: list[Result]) -> None:
    done = [found for found in results if found.status == "done"]
    drawn = {(x, y) for x, y, _ in markers(frontier_figure(results, OBJECTIVES).axes[0])}
    assert drawn == {(found.metrics[REFUSAL].value, found.metrics[TASK].value) for found in done}


def test_filled_means_projected_and_hollow_means_not() -> None:
    figure = frontier_figure(
        [result(0, refusal=0.3), result(1, refusal=0.8, share=0.5)], OBJECTIVES
    )
    assert markers(figure.axes[0]) == [(0.3, 0.5, False), (0.8, 0.5, True)]


def test_a_metric_of_exactly_one_has_no_negative_error_bar() -> None:
    below, above = error_bar(Metric(REFUSAL, 200, 200))
    assert above == [0.0]
    assert below[0] > 0


def test_aligned_models_are_stars(results: list[Result], baselines: Baselines) -> None:
    figure = frontier_figure(results, OBJECTIVES, baselines)
    assert {(x, y) for x, y, _ in markers(figure.axes[0], "*")} == {(0.96, 0.22), (0.985, 0.31)}


@pytest.mark.parametrize(("first", "style"), [(REFUSAL, "steps-pre"), (OVER, "steps-post")])
def test_the_steps_border_what_the_frontier_dominates(first: str, style: str) -> None:
    figure = frontier_figure([result(0), result(1, refusal=0.7, task=0.3)], (first, TASK))
    assert [
        line.get_drawstyle() for line in figure.axes[0].lines if line.get_linewidth() == 1.4
    ] == [style]


def test_a_ring_is_round_the_picked_point_and_the_words_name_it() -> None:
    first, second = result(0, refusal=0.9, task=0.2), result(1, refusal=0.7, task=0.3)
    figure = frontier_figure([first, second], OBJECTIVES, picked=[second])
    rings = [line for line in figure.axes[0].lines if line.get_markersize() == RING]
    assert [tuple(line.get_xydata()[0]) for line in rings] == [(0.7, 0.3)]
    assert "picked" in [text.get_text() for text in figure.legends[0].get_texts()]
    words = frontier_words([first, second], OBJECTIVES, {}, [second])
    assert "point 1, refusal rate 70.0% and task accuracy 30.0%." in words
    assert "Picked" not in frontier_words([first, second], OBJECTIVES, {})


def test_axis_labels_state_which_direction_is_better(results: list[Result]) -> None:
    axes = frontier_figure(results, (OVER, TASK)).axes[0]
    assert axes.get_xlabel() == "over refusal rate (harmless), lower is better"
    assert axes.get_ylabel() == "task accuracy, higher is better"


def test_one_objective_is_drawn_over_the_points_numbers(
    results: list[Result], baselines: Baselines
) -> None:
    axes = frontier_figure(results, (REFUSAL,), baselines).axes[0]
    assert axes.get_xlabel() == "point number"
    assert sorted(x for x, _, _ in markers(axes)) == [
        found.number for found in results if found.status == "done"
    ]


def test_the_title_states_that_two_of_three_objectives_are_drawn(results: list[Result]) -> None:
    assert "first 2 of 3 objectives" in frontier_figure(results, (REFUSAL, TASK, OVER)).axes[
        0
    ].get_title(loc="left")


def test_a_figure_without_a_finished_point_states_that() -> None:
    for results in ([], [failed(0)]):
        assert [text.get_text() for text in frontier_figure(results, OBJECTIVES).axes[0].texts] == [
            "no point has finished"
        ]


def test_models_have_different_looks_in_natural_order() -> None:
    found = looks(["70b", "7b", "13b", *(f"other {number}" for number in range(30))])
    assert list(found)[:3] == ["7b", "13b", "70b"]
    assert len(set(found.values())) == 33


def test_thresholds_have_a_panel_per_model_and_metric(
    results: list[Result], baselines: Baselines
) -> None:
    figure = threshold_figure(results, OBJECTIVES, baselines)
    assert figure is not None
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["medium", "small"]


def test_a_point_without_threshold_is_drawn_apart_over_none() -> None:
    results = [result(0), result(1, threshold=0.4, share=0.2), result(2, threshold=0.8, share=0.9)]
    figure = threshold_figure(results, (REFUSAL,))
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        "none",
        "0.4",
        "0.8",
    ]
    assert min(x for x, _, _ in markers(figure.axes[0])) < 0.35


def many_results(trainings: int, thresholds: int) -> list[Result]:
    """Points of that many trainings, each with that many thresholds and without one."""
    numbered = ((t, v) for t in range(trainings) for v in range(thresholds + 1))
    return [
        result(
            number,
            refusal=0.1 + 0.8 * value / (thresholds + 1),
            task=0.9 - 0.8 * value / (thresholds + 1) + training / 1000 / trainings,
            rank=training + 1,
            threshold=value / (thresholds + 1) if value else None,
            share=0.5 if value else 0.0,
        )
        for number, (training, value) in enumerate(numbered)
    ]


@pytest.mark.parametrize("trainings", [MOST_LOOKS, MOST_LOOKS + 20, 6 * MOST_LOOKS])
def test_figures_of_many_points_have_a_bounded_number_of_parts(trainings: int) -> None:
    results = many_results(trainings, 29)
    frontier, thresholds = frontier_figure(results, OBJECTIVES), threshold_figure(results, [TASK])
    assert thresholds is not None
    for axes in (frontier.axes[0], thresholds.axes[0]):
        assert len(axes.containers) <= 2 * MOST_LOOKS
        assert len(axes.lines) + len(axes.collections) <= 8 * MOST_LOOKS
        assert len(markers(axes)) + plain_dots(axes) >= len(results)
    assert len(markers(frontier.axes[0])) < 50 < plain_dots(frontier.axes[0])
    assert len(thresholds.legends[0].get_texts()) <= MOST_LOOKS + 2
    assert "the others are dots" in frontier_caption(results)


def test_the_line_of_many_trainings_is_the_median_of_each_threshold() -> None:
    results = many_results(MOST_LOOKS + 1, 3)
    figure = threshold_figure(results, [REFUSAL])
    assert figure is not None
    (line,) = [each for each in figure.axes[0].lines if each.get_linewidth() == 1.6]
    expected = [0.1 + 0.8 * value / 4 for value in (1, 2, 3)]
    assert np.allclose(line.get_xydata(), np.array([(0.25, 0.5, 0.75), expected]).T, atol=0.003)
    assert f"{MOST_LOOKS + 1} trainings are too many" in threshold_caption(results)


def test_no_group_of_thresholds_splits_a_value() -> None:
    """Half of the points have one threshold; the line has one place for it."""
    results = many_results(MOST_LOOKS + 1, 60)
    results = [
        each
        if each.number % 2
        else result(each.number, threshold=0.5, rank=each.number % 50 + 1, share=0.5)
        for each in results
    ]
    figure = threshold_figure(results, [REFUSAL])
    assert figure is not None
    (line,) = [each for each in figure.axes[0].lines if each.get_linewidth() == 1.6]
    places = [x for x, _ in line.get_xydata()]
    assert 5 < len(places) <= 20 and len(set(places)) == len(places)


def test_results_without_thresholds_have_no_threshold_figure() -> None:
    plain = result(0)
    without_axis = Result(0, Point.of("small", {"train.rank": 8}), "done", plain.metrics)
    for results in ([], [failed(0)], [plain], [without_axis]):
        assert threshold_figure(results, (REFUSAL,)) is None


@pytest.mark.slow
def test_saved_figures_embed_truetype_and_are_reproducible(
    results: list[Result], tmp_path: Path
) -> None:
    first = save(frontier_figure(results, OBJECTIVES), tmp_path / "a", "frontier")
    second = save(frontier_figure(results, OBJECTIVES), tmp_path / "b", "frontier")
    assert [path.name for path in first] == ["frontier.png", "frontier.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert b"/FontFile2" in first[1].read_bytes()
    assert b"/Type3" not in first[1].read_bytes()
    assert svg(frontier_figure(results, OBJECTIVES)) == svg(frontier_figure(results, OBJECTIVES))


@pytest.mark.process
def test_drawing_changes_no_setting_of_matplotlib_and_loads_no_pyplot(
    results: list[Result],
) -> None:
    before = dict(matplotlib.rcParams)
    frontier_figure(results, OBJECTIVES)
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, ebbline.analysis.report.report; assert not {'matplotlib.pyplot', 'torch', "
        "'ray', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_page_changes_the_size_of_a_figure_but_not_its_content(
    results: list[Result], baselines: Baselines, tmp_path: Path
) -> None:
    screen, column = (
        frontier_figure(results, OBJECTIVES, baselines, page)
        for page in (Page(), Page(width=3.03, text_pt=7.5))
    )
    assert tuple(screen.get_size_inches()) == (6.4, 4.8) and column.get_size_inches()[0] == 3.03
    assert markers(column.axes[0]) == markers(screen.axes[0])
    assert [
        path.suffix for path in save_for_print(column, tmp_path, "frontier", Page(width=3.03))
    ] == [".pdf", ".svg", ".png"]


def test_one_column_has_a_row_for_each_model_and_a_column_for_each_metric(
    results: list[Result], baselines: Baselines
) -> None:
    whole = threshold_figure(results, OBJECTIVES, baselines, Page(width=6.3))
    column = threshold_figure(results, OBJECTIVES, baselines, Page(width=3.03))
    assert whole is not None and column is not None
    assert [axes.get_title() for axes in whole.axes] == ["medium", "small", "", ""]
    assert [axes.get_ylabel() for axes in column.axes] == ["medium", "", "small", ""]
    assert [markers(axes) for axes in column.axes] == [
        markers(whole.axes[index]) for index in (0, 2, 1, 3)
    ]


def with_seeds(found: Result) -> Result:
    """The result with three seeds, whose values are 10 points apart."""
    metrics = {
        name: Metric(
            metric.name,
            metric.successes,
            metric.n,
            seeds=(metric.value - 0.1, metric.value, metric.value + 0.1),
        )
        for name, metric in found.metrics.items()
    }
    return replace(found, metrics=metrics)


def seed_marks(figure: Figure) -> list[tuple[float, float]]:
    """(x, y) of every training seed drawn."""
    return [
        (round(float(x), 6), round(float(y), 6))
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "o" and line.get_markersize() < 2.4 and not line.get_rasterized()
        for x, y in np.asarray(line.get_xydata(), dtype=np.float64)
    ]


def signs(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_figure_shows_the_value_of_each_seed_beside_the_interval() -> None:
    few = [result(0, refusal=0.3, task=0.6), result(1, refusal=0.8, share=0.5, threshold=0.5)]
    seeds = [with_seeds(found) for found in few]
    lines = [Line("small", REFUSAL, {"tuned": seeds[0].metrics[REFUSAL]}, {})]
    thresholds = threshold_figure(seeds, OBJECTIVES)
    before_after = before_after_figure(lines)
    assert thresholds is not None and before_after is not None
    drawn = {
        "frontier": (frontier_figure(seeds, OBJECTIVES), frontier_caption(seeds), 6),
        "thresholds": (thresholds, threshold_caption(seeds), 12),
        "before and after": (before_after, before_after_caption(lines), 3),
    }
    for figure, caption, count in drawn.values():
        assert len(seed_marks(figure)) == count
        assert SEEDS in signs(figure) and SEEDS_NOTE in caption
    assert {(0.2, 0.5), (0.3, 0.6), (0.4, 0.7)} < set(seed_marks(drawn["frontier"][0]))
    assert SEEDS_NOTE in defences_caption([], seeds)
    plain = frontier_figure(few, OBJECTIVES)
    assert not seed_marks(plain) and SEEDS not in signs(plain)
    assert SEEDS_NOTE not in frontier_caption(few) and SEEDS_NOTE not in defences_caption([], few)
