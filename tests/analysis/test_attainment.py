"""Bands over seeds: the surfaces, the number of seeds, and no band for one seed."""

import numpy as np

from ebbline.analysis.figures.attainment import attainment_figure
from ebbline.analysis.figures.words import attainment_words
from ebbline.analysis.results.attainment import attainments, staircase
from ebbline.sweeps.study.points import Point, Result
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import OVER, REFUSAL, TASK, result

OBJECTIVES = (REFUSAL, TASK)


def seeded(
    number: int, refusals: tuple[float, ...], tasks: tuple[float, ...], model: str = "small"
) -> Result:
    metrics = {
        name: Metric(name, round(100 * sum(values)), 100 * len(values), seeds=values)
        for name, values in ((REFUSAL, refusals), (TASK, tasks))
    }
    return Result(number, Point.of(model, {"train.rank": number}), "done", metrics)


def test_surfaces_of_some_half_and_all_seeds() -> None:
    rows = [
        seeded(0, (0.2, 0.3, 0.1), (0.9, 0.8, 0.95)),
        seeded(1, (0.8, 0.7, 0.75), (0.3, 0.4, 0.2)),
    ]
    found = attainments(rows, OBJECTIVES)["small"]
    assert (found.seeds, found.points, found.left_out) == (3, 2, 0)
    surfaces = {
        level: sorted(map(tuple, values.round(6).tolist()))
        for level, values in found.surfaces.items()
    }
    assert surfaces["some"] == [(0.1, 0.95), (0.2, 0.9), (0.3, 0.8), (0.7, 0.4), (0.8, 0.3)]
    assert surfaces["all"] == [(0.1, 0.8), (0.7, 0.2)]
    # Two of three seeds: (0.2, 0.8) lies below the first two seeds' first points, (0.75, 0.2) below
    # the first's and third's second.
    assert surfaces["half"] == [(0.1, 0.9), (0.2, 0.8), (0.7, 0.3), (0.75, 0.2)]


def test_a_minimised_metric_is_attained_by_lower_values() -> None:
    rows = [
        Result(
            0,
            Point.of("small", {}),
            "done",
            {name: Metric(name, 30, 200, seeds=(0.1, 0.2)) for name in (REFUSAL, OVER)},
        )
    ]
    found = attainments(rows, (REFUSAL, OVER))["small"]
    # Seed 0 has (0.1, 0.1), seed 1 has (0.2, 0.2). Both attain only (0.1, 0.2), as fewer
    # over-refusals are better.
    assert found.surfaces["all"].round(6).tolist() == [[0.1, 0.2]]
    xs, ys = staircase(found.surfaces["all"], (REFUSAL, OVER))
    assert (xs.round(6).tolist(), ys.round(6).tolist()) == ([0.0, 0.1, 0.1], [0.2, 0.2, 1.0])


def test_points_with_fewer_seeds_are_left_out_and_counted() -> None:
    rows = [seeded(0, (0.2, 0.3), (0.9, 0.8)), seeded(1, (0.9,), (0.9,))]
    found = attainments(rows, OBJECTIVES)["small"]
    assert (found.points, found.left_out) == (1, 1)
    assert max(np.concatenate(found.by_seed)[:, 0]) < 0.9


def test_one_seed_or_one_objective_has_no_band() -> None:
    assert attainments([result(0), result(1, threshold=0.5, share=0.5)], OBJECTIVES) == {}
    assert attainments([seeded(0, (0.2, 0.3), (0.9, 0.8))], (REFUSAL,)) == {}
    assert attainment_figure({}, OBJECTIVES) is None


def test_the_staircase_is_the_border_of_the_dominated_area() -> None:
    xs, ys = staircase(np.array([[0.8, 0.3], [0.2, 0.9]]), OBJECTIVES)
    assert (xs.tolist(), ys.tolist()) == ([0.0, 0.2, 0.2, 0.8, 0.8], [0.9, 0.9, 0.3, 0.3, 0.0])


def test_each_size_has_a_panel_and_a_sentence_and_only_three_seeds_a_median() -> None:
    rows = [
        seeded(0, (0.2, 0.3), (0.9, 0.8)),
        seeded(1, (0.2, 0.3, 0.4), (0.9, 0.8, 0.7), "medium"),
    ]
    found = attainments(rows, OBJECTIVES)
    figure = attainment_figure(found, OBJECTIVES)
    assert figure is not None
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["medium, 3 seeds", "small, 2 seeds"]
    solid = {
        name: [line for line in axes.lines if line.get_linestyle() == "-"]
        for name, axes in panels.items()
    }
    assert {name: len(lines) for name, lines in solid.items()} == {
        "medium, 3 seeds": 1,
        "small, 2 seeds": 0,
    }
    words = attainment_words(found, OBJECTIVES)
    assert (
        "small, 2 seeds, 1 points: refusal rate reaches 20.0% with every seed and 30.0% with some"
        in words
    )
