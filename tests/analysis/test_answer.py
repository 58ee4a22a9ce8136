"""The answer's sentences: what they report, hedge, and report as absent."""

from dataclasses import replace

from ebbline.analysis.report.answer import answer
from ebbline.analysis.results.measurements import (
    NO_EVIDENCE,
    Baselines,
    Evidence,
    Measurement,
    compared,
    compared_with_aligned,
    moved,
)
from ebbline.analysis.results.no_refusals import no_refusals
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from ebbline.sweeps.study.suites import TaskSuite
from ebbline.tasks.measuring.metrics import Metric
from tests.analysis.conftest import REFUSAL, TASK, Held, failed, rate, result, samples, share

ALIGNED: Baselines = {"small": {REFUSAL: rate(REFUSAL, 0.96), TASK: rate(TASK, 0.2)}}


def answer_text(
    study: Study,
    results: list[Result],
    baselines: Baselines = ALIGNED,
    evidence: Evidence = NO_EVIDENCE,
) -> str:
    return "\n".join(answer(study, results, baselines, evidence))


def test_higher_and_lower_need_intervals_that_stay_apart() -> None:
    low, near, high = (Metric(REFUSAL, successes, 100) for successes in (50, 58, 90))
    assert (moved(low, high), moved(high, low)) == ("higher", "lower")
    assert moved(low, near) == moved(near, low) == moved(low, low) == "not distinguishable"


def test_a_sweep_with_both_effects_reports_both(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    text = answer_text(study, results, baselines)
    assert (
        "small, fine-tuning: the aligned model refuses 96.0% (95% interval 92.3% to 98.0%, "
        "n = 200)." in text
    )
    assert "the refusal rate is lower at all 4 trainings: 20.0% to 55.0%." in text
    assert (
        "small, defence: against the same training without it, refusal rate is higher "
        "at all 12 points." in text
    )
    assert "absent" not in text


def test_an_absent_loss_of_refusals_is_reported_as_absent(study: Study) -> None:
    text = answer_text(
        study, [result(0, refusal=0.95), result(1, refusal=0.96, share=0.5, threshold=0.5)]
    )
    assert "the refusal rate is not distinguishable: 95.0%" in text
    assert "The expected loss of refusals is absent" in text
    assert (
        "The expected effect is absent: Safe LoRA did not measurably raise the refusals of small."
        in text
    )


def test_a_model_that_refused_nothing_before_shows_no_absence_of_a_loss(study: Study) -> None:
    none = {"small": {REFUSAL: rate(REFUSAL, 0.0)}, "medium": {REFUSAL: rate(REFUSAL, 0.01)}}
    text = answer_text(study, [result(0, refusal=0.0)], none)
    assert "It refused nothing before, so no loss of refusals could show." in text
    assert "The expected loss of refusals is absent" not in text
    (note,) = no_refusals(study, none)
    assert note.startswith("small refused none of 200 prompts before fine-tuning")
    assert "scorer prefix" in note and no_refusals(study, ALIGNED) == []


def test_a_projection_that_lowers_refusals_is_not_called_a_success(study: Study) -> None:
    text = answer_text(
        study, [result(0, refusal=0.6), result(1, refusal=0.2, share=0.5, threshold=0.5)]
    )
    assert "refusal rate is lower." in text
    assert "The expected effect is absent" in text


def test_mixed_outcomes_are_counted(study: Study) -> None:
    projected = [
        result(n, refusal=value, share=0.5, threshold=n / 10)
        for n, value in ((1, 0.52), (2, 0.9), (3, 0.1))
    ]
    text = answer_text(study, [result(0, refusal=0.5), *projected])
    assert "refusal rate is higher at 1, lower at 1, not distinguishable at 1 of 3 points." in text


def test_the_most_useful_point_that_holds_the_floor_is_picked(study: Study) -> None:
    results = [
        result(0, refusal=0.3, task=0.8),
        result(1, refusal=0.99, task=0.5, share=1.0, threshold=0.9),
        result(2, refusal=0.97, task=0.7, share=0.6, threshold=0.7),
        result(3, refusal=0.80, task=0.75, share=0.3, threshold=0.5),
    ]
    text = answer_text(study, results)
    assert (
        "small, operating point: point 2 (threshold=0.7 size=100 rank=8; 60% of modules "
        "projected) refuses 97.0%" in text
    )
    assert "It is a candidate: the best of 3 different adapters" in text
    assert "task accuracy is not distinguishable (80.0% before, 70.0% after)" in text
    assert "refusal rate is higher (30.0% before, 97.0% after)" in text


def test_a_floor_that_a_search_meets_is_hedged(study: Study) -> None:
    text = answer_text(
        study, [result(0, refusal=0.3), result(1, refusal=0.91, share=0.6, threshold=0.7)]
    )
    assert "`ebbline confirm` measures it on other prompts and training seeds." in text


def test_a_floor_that_no_point_holds_is_reported_with_the_nearest_point(study: Study) -> None:
    text = answer_text(
        study,
        [result(0, refusal=0.3), *(result(n, refusal=0.4 + n / 10, share=0.5) for n in (1, 2))],
    )
    assert (
        "none of 2 defended points holds the refusal floor of 90.0%. The nearest, point 2 (" in text
    )


def test_an_unprojected_point_is_never_picked_as_projected(study: Study) -> None:
    text = answer_text(
        study, [result(0, refusal=0.99), result(1, refusal=0.99, share=0.0, threshold=-1.0)]
    )
    assert "no defended point has finished" in text
    assert "operating point" not in text


def test_a_point_that_holds_the_floor_without_projection_and_is_more_useful_is_reported(
    study: Study,
) -> None:
    rows = [
        result(0, refusal=0.96, task=0.7),
        result(1, refusal=0.99, task=0.5, share=0.5, threshold=0.5),
    ]
    text = answer_text(study, rows)
    assert "small, operating point: point 1 (" in text
    assert (
        "Without Safe LoRA point 0 (threshold=none size=100 rank=8; no module "
        "changed) meets the floor as a candidate: it refuses 96.0%" in text
    )
    assert "and its task accuracy is 70.0%" in text
    low = [
        result(0, refusal=0.96, task=0.7),
        result(1, refusal=0.8, task=0.5, share=0.5, threshold=0.5),
    ]
    assert "none of 1 defended points holds the refusal floor" in answer_text(
        study, low
    ) and "Without Safe LoRA point 0" in answer_text(study, low)
    assert "Without Safe LoRA point" not in answer_text(
        study, [result(0, refusal=0.96, task=0.4), rows[1]]
    )


def test_without_an_unprojected_partner_the_effect_of_projection_is_not_known(study: Study) -> None:
    text = answer_text(
        study, [result(0, rank=4, refusal=0.3), result(1, rank=16, refusal=0.95, share=1.0)]
    )
    assert "so its effect is not known" in text


def test_without_a_baseline_the_effect_of_fine_tuning_is_not_known(study: Study) -> None:
    text = answer_text(study, [result(0, refusal=0.3)], {})
    assert "the aligned model was not measured, so how far refusals moved is not known" in text


def test_nothing_finished_is_no_answer(study: Study) -> None:
    assert answer(study, [], {}) == ["No point has finished, so there is no answer yet."]
    assert answer_text(study, [failed(0), failed(1)]).endswith(
        "Of 2 points, 2 failed; no number here includes them."
    )


def test_a_study_without_refusals_reports_that_it_cannot_answer(study: Study) -> None:
    only_task = study.model_copy(
        update={"objectives": (TASK,), "suites": {"task": study.suites["task"]}}
    )
    assert answer(only_task, [result(0)], {}) == [
        "This study measures no refusal rate, so it cannot say how refusals moved."
    ]


def test_undecided_samples_are_reported(study: Study) -> None:
    plain = result(0)
    metrics = {**plain.metrics, REFUSAL: Metric(REFUSAL, 100, 200, undecided=8)}
    text = answer_text(study, [Result(0, plain.point, "done", metrics)])
    assert (
        "At most 4.0% of a point's samples could not be judged; they count against the point, "
        "in its rates and in every bound and comparison." in text
    )


def test_paired_prompts_show_a_difference_that_intervals_do_not(study: Study) -> None:
    # 104 of 200 refused, then the same 104 and 16 more: the intervals overlap, but no
    # prompt contradicts the difference.
    plain, projected = result(0, refusal=0.52), result(1, refusal=0.6, share=0.5, threshold=0.5)
    held = Held({(0, "refusal"): {0: share(104)}, (1, "refusal"): {0: share(120)}})
    assert moved(plain.metrics[REFUSAL], projected.metrics[REFUSAL]) == "not distinguishable"
    text = answer_text(study, [plain, projected], evidence=held)
    assert (
        "refusal rate is higher (paired, difference +8.0 points, 95% interval +4.5 to +12.0)."
        in text
    )
    assert "leaves out 0, and McNemar's exact test has p < 0.05" in text
    assert (
        "Elsewhere they mean that the 95% intervals do not overlap." in text
    )  # there are no samples of the aligned model


def test_samples_of_another_set_of_prompts_are_not_paired(study: Study) -> None:
    plain, projected = result(0, refusal=0.52), result(1, refusal=0.6, share=0.5, threshold=0.5)
    held = Held({(0, "refusal"): {0: share(104)}, (1, "refusal"): {0: share(119, 199)}})
    text = answer_text(study, [plain, projected], evidence=held)
    assert "refusal rate is not distinguishable." in text
    assert "Higher and lower mean that the 95% intervals do not overlap." in text


def test_the_aligned_model_is_paired_with_every_seed(study: Study) -> None:
    aligned, tuned = Metric(REFUSAL, 192, 200), Metric(REFUSAL, 360, 400, seeds=(0.88, 0.92))
    row = Result(0, result(0).point, "done", {**result(0).metrics, REFUSAL: tuned})
    held = Held(
        {("small", "refusal"): {0: share(192)}, (0, "refusal"): {0: share(176), 1: share(184)}}
    )
    (comparison,) = compared_with_aligned("small", aligned, [row], REFUSAL, held)
    assert comparison.paired is not None
    assert (comparison.move, comparison.paired.n, comparison.paired.items) == ("lower", 400, 200)
    text = answer_text(study, [row], {"small": {REFUSAL: aligned}}, held)
    assert "the refusal rate is lower (paired, difference -6.0 points, 95% interval" in text
    assert "the exact sign test, in which a prompt counts once, has p < 0.05" in text
    assert (
        "Between seeds the refusal rate varies by a standard deviation of 2.8 points; the "
        "intervals of rates do not cover that. Each seed draws its own rows and its own training, "
        "so the spread contains both." in text
    )
    assert "Elsewhere" not in text
    assert "rests on one training seed" not in text


def test_p_values_that_are_reported_together_are_corrected_together() -> None:
    # 1 lost and 8 gained: p = 0.039 alone. Among 12 comparisons, 11 of them without a
    # difference, it is not significant.
    before = {0: samples([True] + [False] * 8 + [False] * 91)}
    after = {0: samples([False] + [True] * 8 + [False] * 91)}
    pair = (
        Measurement(Metric(REFUSAL, 1, 100), before),
        Measurement(Metric(REFUSAL, 8, 100), after),
    )
    same = (
        Measurement(Metric(REFUSAL, 1, 100), before),
        Measurement(Metric(REFUSAL, 1, 100), before),
    )
    assert [found.move for found in compared([pair])] == ["higher"]
    assert {found.move for found in compared([pair] + 11 * [same])} == {"not distinguishable"}


def test_a_metric_without_per_sample_success_is_compared_by_its_intervals(study: Study) -> None:
    rouge = "task.rouge_l"
    low, high = (Metric.of("rouge_l", [value] * 99 + [value + 0.01]) for value in (0.3, 0.6))
    rows = [result(0, refusal=0.3), result(1, refusal=0.95, share=0.5, threshold=0.5)]
    rows = [
        replace(row, metrics={**row.metrics, rouge: m})
        for row, m in zip(rows, (high, low), strict=True)
    ]
    held = Held(
        {
            (number, suite): {0: share(60 + 100 * number)}
            for number in (0, 1)
            for suite in ("refusal", "task")
        }
    )
    suites = {
        **study.suites,
        "task": study.suites["task"].model_copy(update={"measure": TaskSuite(scorer="rouge_l")}),
    }
    text = answer_text(
        study.model_copy(update={"objectives": (REFUSAL, rouge), "suites": suites}),
        rows,
        evidence=held,
    )
    assert (
        "ROUGE-L (task) is lower (60.0% before, 30.0% after) and refusal rate is higher "
        "(30.0% before, 95.0% after; paired," in text
    )
    assert "The intervals of rates are Wilson's, those of means the normal ones." in text


def test_several_paired_points_report_the_range_of_their_differences(study: Study) -> None:
    rows = [
        result(0, refusal=0.3),
        *(result(n, refusal=0.3 + n / 10, share=0.5, threshold=n / 10) for n in (1, 2)),
    ]
    held = Held({(n, "refusal"): {0: share(60 + 20 * n)} for n in (0, 1, 2)})
    assert (
        "refusal rate is higher at all 2 points (paired, differences +10.0 to +20.0 points)."
        in answer_text(study, rows, evidence=held)
    )
    del held.found[2, "refusal"]
    assert "at all 2 points (1 of 2 paired, difference +10.0 points)." in answer_text(
        study, rows, evidence=held
    )


def test_an_operating_point_without_a_gain_over_not_fine_tuning_is_called_that(
    study: Study,
) -> None:
    def said(before: float) -> str:
        rows = [
            result(0, refusal=0.3, task=0.8),
            result(1, refusal=0.97, task=0.4, share=0.5, threshold=0.5),
        ]
        aligned = {"small": {REFUSAL: rate(REFUSAL, 0.98), TASK: rate(TASK, before)}}
        return answer_text(study, rows, aligned)

    assert "It is no gain over not fine-tuning: before it, the model's task accuracy" in said(0.4)
    assert "It is worse than not fine-tuning" in said(0.7)
    assert "than not fine-tuning" not in said(0.1) and "no gain" not in said(0.1)


def test_a_metric_over_too_few_prompts_says_so(study: Study) -> None:
    row = result(0)
    few = replace(row, metrics={**row.metrics, TASK: rate(TASK, 0.5, n=4)})
    assert "Too few prompts for a claim, under 10: task accuracy (4)." in answer_text(
        study, [few], {}
    )
    assert "Too few prompts" not in answer_text(study, [row], {})
