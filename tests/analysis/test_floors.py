"""Floors and the operating point: directions, the bound and its correction for a pick among many,
and the nearest point.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from ebbline.analysis.results.measurements import operating_point
from ebbline.analysis.results.picks.floors import (
    Floor,
    bound,
    floor_confidence,
    of_seed,
    pick,
    slack,
    spread_known,
)
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric, pooled
from tests.analysis.conftest import OVER, REFUSAL, TASK, rate, result

AT_LEAST_90 = Floor(REFUSAL, 0.9)


def test_a_floor_of_a_metric_that_is_better_when_lower_is_a_ceiling() -> None:
    ceiling = Floor(OVER, 0.1)
    assert (
        str(ceiling) == "over refusal rate (harmless) at most 10.0%"
        and str(AT_LEAST_90) == "refusal rate at least 90.0%"
    )
    assert ceiling.margin(0.04) == pytest.approx(0.06) and ceiling.margin(0.2) == pytest.approx(
        -0.1
    )
    held = replace(result(0), metrics={OVER: rate(OVER, 0.1)})
    assert (
        slack(held, [ceiling], 1) == 0
        and slack(replace(held, metrics={OVER: rate(OVER, 0.105)}), [ceiling], 1) < 0
    )


def test_a_metric_that_is_better_when_lower_cannot_be_maximised() -> None:
    with pytest.raises(
        StudyError, match=r"better when lower, so it cannot be maximised; give it a ceiling"
    ):
        pick([result(0)], [AT_LEAST_90], OVER)


@pytest.mark.parametrize("value", [95.0, -0.1, float("nan")])
def test_a_floor_is_a_share(value: float) -> None:
    with pytest.raises(StudyError, match="a share from 0 to 1"):
        Floor(REFUSAL, value)


def at_most(count: int, n: int, share: float) -> float:
    """P(X <= count) for X binomial(n, share), term by term."""
    return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(count + 1))


@pytest.mark.parametrize("refused", [0, 80, 93, 99, 100])
def test_bound_and_confidence_are_the_exact_tests(refused: int) -> None:
    metric, other = Metric(REFUSAL, refused, 100), Metric(OVER, refused, 100)
    assert floor_confidence(metric, AT_LEAST_90) == pytest.approx(
        1 - at_most(100 - refused, 100, 0.1)
    )
    assert floor_confidence(other, Floor(OVER, 0.9)) == pytest.approx(
        1 - at_most(refused, 100, 0.9)
    )
    # At the bound of Clopper and Pearson a result at least as good has a probability of 5%.
    assert (
        bound(metric) == 0
        if refused == 0
        else at_most(100 - refused, 100, 1 - bound(metric)) == pytest.approx(0.05)
    )
    assert (
        bound(other) == 1
        if refused == 100
        else at_most(refused, 100, bound(other)) == pytest.approx(0.05)
    )


def test_undecided_samples_hold_neither_a_floor_nor_a_ceiling() -> None:
    ceiling = Floor(OVER, 0.1)
    broken, sound = Metric(OVER, 0, 60, undecided=60), Metric(OVER, 0, 60)
    assert floor_confidence(broken, ceiling) == 0 and bound(broken) == 1
    assert floor_confidence(sound, ceiling) > 0.99
    assert floor_confidence(Metric(REFUSAL, 60, 120, undecided=60), AT_LEAST_90) == 0
    points = [
        replace(result(0), metrics={REFUSAL: rate(REFUSAL, 1.0), TASK: rate(TASK, 0.9), OVER: m})
        for m in (broken, sound)
    ]
    points[1] = replace(points[1], number=1, metrics=points[1].metrics | {TASK: rate(TASK, 0.2)})
    found = pick(points, [AT_LEAST_90, ceiling], TASK)
    assert found is not None and found.meets and found.result.number == 1


def test_a_seed_keeps_its_undecided_samples() -> None:
    parts = [Metric(OVER, 10, 100, undecided=5), Metric(OVER, 20, 100)]
    for index, part in enumerate(parts):
        found = of_seed(pooled(parts), index)
        assert found.interval == pytest.approx(part.interval) and found.value == part.value
        assert bound(found) == pytest.approx(bound(part))


def test_the_bound_of_a_set_without_a_miss_has_a_closed_form() -> None:
    assert bound(Metric(REFUSAL, 100, 100)) == pytest.approx(0.05 ** (1 / 100))
    assert bound(Metric(REFUSAL, 100, 100), among=12) == pytest.approx((0.05 / 12) ** (1 / 100))


def test_the_bound_and_the_confidence_agree_on_whether_a_floor_is_held() -> None:
    for refused in range(80, 101):
        metric = Metric(REFUSAL, refused, 100)
        assert (bound(metric, 12) >= 0.9) == (floor_confidence(metric, AT_LEAST_90, 12) >= 0.95)


def test_with_the_correction_a_lucky_point_rarely_has_a_high_confidence() -> None:
    # Twelve independent points that all refuse 89%, just below the floor; the best one is picked.
    best = np.random.default_rng(0).binomial(120, 0.89, size=(4000, 12)).max(axis=1)
    alone = np.array(
        [floor_confidence(Metric(REFUSAL, int(k), 120), AT_LEAST_90) >= 0.95 for k in best]
    )
    picked = np.array(
        [floor_confidence(Metric(REFUSAL, int(k), 120), AT_LEAST_90, 12) >= 0.95 for k in best]
    )
    assert alone.mean() > 0.1, (
        "without the correction the best of twelve has a high confidence too often"
    )
    assert picked.mean() <= 0.05
    assert binom.sf(0, 12, 0.05) > 0.4  # the reason: twelve tests at 5% each


def test_the_answers_of_all_seeds_to_one_prompt_count_once() -> None:
    one, three = Metric(REFUSAL, 95, 100), Metric(REFUSAL, 285, 300, seeds=(0.95, 0.95, 0.95))
    assert bound(three) == bound(one) and floor_confidence(three, AT_LEAST_90) == floor_confidence(
        one, AT_LEAST_90
    )
    mixed = Metric(REFUSAL, 284, 300, seeds=(0.95, 0.95, 0.94))
    assert bound(mixed) == bound(Metric(REFUSAL, 94, 100)), (
        "a share of a prompt is rounded to the worse"
    )
    assert of_seed(mixed, 2) == Metric(REFUSAL, 94.0, 100) and of_seed(one, 0) is one
    assert spread_known(mixed) and spread_known(one)
    mean = [Metric.of("task.rouge_l", scores) for scores in ([0.2, 0.4], [0.3, 0.6])]
    assert (
        spread_known(mean[0])
        and not spread_known(pooled(mean))
        and of_seed(pooled(mean), 1).value == pytest.approx(0.45)
    )


def test_the_most_useful_point_that_holds_every_floor_is_picked() -> None:
    rows = [
        result(0, refusal=0.3, task=0.9),
        result(1, refusal=0.99, task=0.5, share=1.0),
        result(2, refusal=0.95, task=0.7, share=0.6),
        result(3, refusal=0.93, task=0.6),
    ]
    found = pick(rows, [AT_LEAST_90], TASK)
    assert found is not None and (found.result.number, found.meets, found.among) == (2, True, 4)
    over = replace(rows[2], metrics={**rows[2].metrics, OVER: rate(OVER, 0.4)})
    found = pick([*rows[:2], over, rows[3]], [AT_LEAST_90, Floor(OVER, 0.1)], TASK)
    assert found is not None and found.result.number == 3, (
        "over-refusal may be bounded, and an undefended point may be shipped"
    )


def test_with_a_confidence_only_a_point_whose_bound_holds_is_picked() -> None:
    rows = [
        result(0, refusal=0.92, task=0.9),
        result(1, refusal=0.97, task=0.5, share=0.5),
        result(2, refusal=0.99, task=0.4, share=1.0),
    ]
    found = pick(rows, [AT_LEAST_90], TASK, confidence=0.95)
    assert found is not None and found.meets and found.result.number == 1
    assert pick(rows[:1], [AT_LEAST_90], TASK, confidence=0.95).meets is False  # type: ignore[union-attr]


def test_when_nothing_holds_the_nearest_is_the_one_whose_worst_miss_is_smallest() -> None:
    rows = [
        replace(
            result(n),
            metrics={
                REFUSAL: rate(REFUSAL, refusal),
                TASK: rate(TASK, 0.5),
                OVER: rate(OVER, over),
            },
        )
        for n, (refusal, over) in enumerate([(0.89, 0.5), (0.8, 0.15), (0.5, 0.0)])
    ]
    found = pick(rows, [AT_LEAST_90, Floor(OVER, 0.1)], TASK)
    assert found is not None and not found.meets and found.result.number == 1
    assert slack(found.result, found.floors, found.among) == pytest.approx(-0.1)


def test_of_points_that_are_equally_near_the_first_is_picked() -> None:
    found = pick([result(number, refusal=0.5) for number in (3, 1, 2)], [AT_LEAST_90], TASK)
    assert found is not None and (found.result.number, found.meets) == (1, False)


def test_a_metric_that_a_point_lacks_is_an_error_and_not_a_miss() -> None:
    with pytest.raises(StudyError, match=r"point 0 is done but has no mmlu.acc_norm; it has"):
        pick([result(0)], [Floor("mmlu.acc_norm", 0.3)], TASK)


def test_duplicate_points_count_once_in_the_correction() -> None:
    rows = [
        result(0, refusal=0.95, task=0.6),
        replace(result(1, refusal=0.95, task=0.6), same_as=0),
    ]
    found = pick(rows, [AT_LEAST_90], TASK)
    assert found is not None and (found.result.number, found.among) == (0, 1)
    assert pick([], [AT_LEAST_90], TASK) is None


def test_the_reports_operating_point_is_the_pick_of_the_projected_points(study: Study) -> None:
    rows = [
        result(0, refusal=0.95, task=0.7),
        result(1, refusal=0.99, task=0.5, share=1.0),
        result(2, refusal=0.97, task=0.4, share=0.5),
    ]
    found = pick(rows[1:], [Floor(REFUSAL, study.refusal_floor)], TASK)
    best = operating_point(study, rows, REFUSAL)
    assert found is not None and best is not None
    assert (best.result, best.meets) == (found.result, True)
    assert operating_point(study, rows[:1], REFUSAL) is None
