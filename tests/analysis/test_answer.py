"""The sentences: what they say, what they hedge, and what they admit is absent."""

from analysis.answer import answer
from analysis.compare import Baselines, moved
from sweeps.points import Result
from sweeps.study import Study
from tasks.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, failed, rate, result

ALIGNED: Baselines = {"small": {REFUSAL: rate(REFUSAL, 0.96), TASK: rate(TASK, 0.2)}}


def text(study: Study, results: list[Result], baselines: Baselines = ALIGNED) -> str:
    return "\n".join(answer(study, results, baselines))


def test_higher_and_lower_need_intervals_that_stay_apart() -> None:
    low, near, high = (Metric(REFUSAL, successes, 100) for successes in (50, 58, 90))
    assert (moved(low, high), moved(high, low)) == ("higher", "lower")
    assert moved(low, near) == moved(near, low) == moved(low, low) == "not distinguishable"


def test_a_sweep_with_both_effects_is_told_as_one(study: Study, results: list[Result], baselines: Baselines) -> None:
    said = text(study, results, baselines)
    assert "small, fine-tuning: the aligned model refuses 96.0% (95% interval 92.3% to 98.0%, n = 200)." in said
    assert "the refusal rate is lower at all 4 trainings: 20.0% to 55.0%." in said
    assert "small, projection: against the same training without it, refusal rate is higher at all 12 points." in said
    assert "absent" not in said


def test_an_absent_loss_of_refusals_is_said_to_be_absent(study: Study) -> None:
    said = text(study, [result(0, refusal=0.95), result(1, refusal=0.96, share=0.5, threshold=0.5)])
    assert "the refusal rate is not distinguishable: 95.0%" in said
    assert "The expected loss of refusals is absent" in said
    assert "The expected effect is absent: projection did not measurably raise the refusals of small." in said


def test_a_projection_that_lowers_refusals_is_not_called_a_success(study: Study) -> None:
    said = text(study, [result(0, refusal=0.6), result(1, refusal=0.2, share=0.5, threshold=0.5)])
    assert "refusal rate is lower." in said
    assert "The expected effect is absent" in said


def test_mixed_outcomes_are_counted(study: Study) -> None:
    projected = [result(n, refusal=value, share=0.5, threshold=n / 10) for n, value in ((1, 0.52), (2, 0.9), (3, 0.1))]
    said = text(study, [result(0, refusal=0.5), *projected])
    assert "refusal rate is higher at 1, lower at 1, not distinguishable at 1 of 3 points." in said


def test_the_most_useful_point_that_holds_the_floor_is_picked(study: Study) -> None:
    results = [
        result(0, refusal=0.3, task=0.8),
        result(1, refusal=0.99, task=0.5, share=1.0, threshold=0.9),
        result(2, refusal=0.97, task=0.7, share=0.6, threshold=0.7),
        result(3, refusal=0.80, task=0.75, share=0.3, threshold=0.5),
    ]
    said = text(study, results)
    assert "small, operating point: point 2 (threshold=0.7 size=100 rank=8; 60% of modules projected) refuses 97.0%" in said
    assert "Its whole interval is at or above the floor." in said
    assert "task accuracy is not distinguishable (80.0% before, 70.0% after)" in said
    assert "refusal rate is higher (30.0% before, 97.0% after)" in said


def test_a_floor_held_by_the_value_alone_is_hedged(study: Study) -> None:
    said = text(study, [result(0, refusal=0.3), result(1, refusal=0.91, share=0.6, threshold=0.7)])
    assert "so whether it holds the floor is not certain." in said


def test_a_floor_that_nothing_holds_is_said_with_the_nearest(study: Study) -> None:
    said = text(study, [result(0, refusal=0.3), *(result(n, refusal=0.4 + n / 10, share=0.5) for n in (1, 2))])
    assert "none of 2 projected points holds the refusal floor of 90.0%. The nearest, point 2 (" in said


def test_an_unprojected_point_is_never_picked_as_projected(study: Study) -> None:
    said = text(study, [result(0, refusal=0.99), result(1, refusal=0.99, share=0.0, threshold=-1.0)])
    assert "no projected point has finished" in said
    assert "operating point" not in said


def test_without_a_twin_the_effect_of_projection_is_not_known(study: Study) -> None:
    said = text(study, [result(0, rank=4, refusal=0.3), result(1, rank=16, refusal=0.95, share=1.0)])
    assert "so the effect of projection is not known" in said


def test_without_a_baseline_the_effect_of_fine_tuning_is_not_known(study: Study) -> None:
    said = text(study, [result(0, refusal=0.3)], {})
    assert "the aligned model was not measured, so how far refusals moved is not known" in said


def test_nothing_finished_is_no_answer(study: Study) -> None:
    assert answer(study, [], {}) == ["No point has finished, so there is no answer yet."]
    assert text(study, [failed(0), failed(1)]).endswith("Of 2 points, 2 failed; no number here includes them.")


def test_a_study_without_refusals_says_that_it_cannot_answer(study: Study) -> None:
    only_task = study.model_copy(update={"objectives": (TASK,), "suites": {"task": study.suites["task"]}})
    assert answer(only_task, [result(0)], {}) == ["This study measures no refusal rate, so it cannot say how refusals moved."]


def test_undecided_samples_are_admitted(study: Study) -> None:
    plain = result(0)
    metrics = {**plain.metrics, REFUSAL: Metric(REFUSAL, 100, 200, undecided=8)}
    said = text(study, [Result(0, plain.point, "done", metrics)])
    assert "At most 4.0% of a point's samples could not be judged; they count as not successful." in said
