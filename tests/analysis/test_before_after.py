"""The three states of a model: the training and its projection, and changes with intervals, paired
where samples exist.
"""

import pytest

from ebbline.analysis.figures.before_after import before_after_figure
from ebbline.analysis.results.before_after import (
    before_after,
    before_after_cells,
    reported_metrics,
    trios,
)
from ebbline.analysis.results.measurements import Baselines, difference_interval
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.study_file import load
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, Held, rate, result, share

ALIGNED: Baselines = {"small": {REFUSAL: rate(REFUSAL, 0.96), TASK: rate(TASK, 0.2)}}


def test_the_fine_tuned_point_is_the_training_of_the_projected_one(study: Study) -> None:
    rows = [
        result(0, rank=4, task=0.9),
        result(1, rank=16),
        result(2, rank=16, refusal=0.95, share=0.5, threshold=0.5),
    ]
    (trio,) = trios(study, rows)
    assert trio.tuned is not None and trio.shipped is not None
    assert (trio.tuned.number, trio.shipped.number, trio.meets) == (1, 2, True)


def test_without_a_projected_point_the_first_training_is_shown(study: Study) -> None:
    (trio,) = trios(study, [result(3), result(1, rank=4)])
    assert trio.tuned is not None and (trio.tuned.number, trio.shipped, trio.holds) == (
        1,
        None,
        False,
    )


def test_a_projected_point_without_its_training_has_no_fine_tuned_state(study: Study) -> None:
    lines = before_after(
        study, [result(0, rank=4), result(1, rank=16, share=0.5, threshold=0.5)], ALIGNED
    )
    refusal = next(line for line in lines if line.name == REFUSAL)
    assert set(refusal.states) == {"aligned", "shipped"} and set(refusal.changes) == {"both"}
    (cells, _) = before_after_cells(lines)
    assert cells[1]["fine-tuned %"].tolist() == ["not measured"] and cells[1][
        "by the defence"
    ].tolist() == [""]


def test_changes_are_paired_where_samples_exist_and_else_marked_as_unpaired(
    study: Study,
) -> None:
    rows = [result(0, refusal=0.5), result(1, refusal=0.6, share=0.5, threshold=0.5)]
    held = Held(
        {
            (0, "refusal"): {0: share(100)},
            (1, "refusal"): {0: share(120)},
            ("small", "refusal"): {0: share(192)},
        }
    )
    refusal, task = before_after(study, rows, ALIGNED, held)
    assert (
        refusal.changes["defence"].paired is not None and refusal.changes["both"].paired is not None
    )
    assert refusal.changes["defence"].move == "higher" and task.changes["defence"].paired is None
    (_, refusals), (_, tasks) = before_after_cells([refusal, task])
    assert refusals["by the defence"].tolist() == ["+10.0 [+6.0, +14.0], higher"]
    assert tasks["by the defence"].tolist()[0].endswith("not distinguishable (unpaired)")


def test_the_aligned_model_is_paired_with_every_seed(study: Study) -> None:
    tuned = Result(
        0,
        result(0).point,
        "done",
        {**result(0).metrics, REFUSAL: Metric(REFUSAL, 360, 400, seeds=(0.88, 0.92))},
    )
    held = Held(
        {("small", "refusal"): {0: share(192)}, (0, "refusal"): {0: share(176), 1: share(184)}}
    )
    paired = before_after(study, [tuned], ALIGNED, held)[0].changes["fine-tuning"].paired
    assert paired is not None and (paired.n, paired.items) == (400, 200)


def test_the_interval_of_an_unpaired_difference_is_newcombes() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table II, example (a): 56/70 minus 48/80,
    # method 10: 0.0524 to 0.3339.
    low, high = difference_interval(Metric(REFUSAL, 48, 80), Metric(REFUSAL, 56, 70))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_all_suites_of_the_quickstart_are_reported() -> None:
    assert reported_metrics(load("quickstart")) == [
        "refusal.refusal_rate", "over_refusal.over_refusal_rate", "task.task_accuracy",
        "mmlu.acc", "mmlu.acc_norm", "hellaswag.acc", "hellaswag.acc_norm",
    ]  # fmt: skip


def test_the_figure_has_a_panel_for_each_metric_and_none_without_results(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    figure = before_after_figure(before_after(study, results, baselines))
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "refusal rate, higher is better",
        "task accuracy, higher is better",
    ]
    assert before_after_figure(before_after(study, [], baselines)) is None
