"""The short answer: two sentences, hedged by intervals, that report what is absent or unknown."""

import re

import pytest

from ebbline.analysis.report.answer import answer
from ebbline.analysis.report.short_answer import in_short
from ebbline.analysis.results.before_after import before_after
from ebbline.analysis.results.measurements import Baselines
from ebbline.sweeps.study.points import Result
from ebbline.sweeps.study.study import Study
from tests.analysis.conftest import REFUSAL, TASK, Held, failed, rate, result, share

ALIGNED: Baselines = {"small": {REFUSAL: rate(REFUSAL, 0.96), TASK: rate(TASK, 0.2)}}


def short(study: Study, results: list[Result], baselines: Baselines = ALIGNED) -> list[str]:
    return in_short(study, results, baselines, before_after(study, results, baselines))


def test_both_effects_are_reported_in_two_sentences_with_an_interval_at_each_rate(
    study: Study, results: list[Result], baselines: Baselines
) -> None:
    fine_tuning, projection = short(study, results, baselines)
    assert fine_tuning.startswith(
        "Fine-tuning without Safe LoRA lowered the refusal rate in all 8 trainings; in "
        "the trainings of the points below"
    )
    assert "from 96.0% [92.3, 98.0] to 20.0% [15.0, 26.1] at small" in fine_tuning
    assert projection.startswith(
        "With Safe LoRA a point of every size meets the refusal floor of 90.0%"
    )
    for sentence in (fine_tuning, projection):
        assert len(re.split(r"(?<=[.!?]) ", sentence)) == 1 and sentence.endswith(".")
        without_floor = sentence.replace("floor of 90.0%", "floor")
        assert (
            len(re.findall(r"\d%", without_floor))
            == len(re.findall(r"\d% \[\d+\.\d, \d+\.\d\]", without_floor))
            > 0
        )


def test_a_loss_that_intervals_do_not_show_is_not_reported(study: Study) -> None:
    (fine_tuning, _) = short(
        study, [result(0, refusal=0.95), result(1, refusal=0.96, share=0.5, threshold=0.5)]
    )
    assert fine_tuning.startswith(
        "Fine-tuning without Safe LoRA did not measurably lower the refusal rate, from 96.0%"
    )


def test_a_projection_that_restores_nothing_is_reported_as_such(study: Study) -> None:
    (_, projection) = short(
        study, [result(0, refusal=0.5), result(1, refusal=0.52, share=0.5, threshold=0.5)]
    )
    assert projection.startswith(
        "With Safe LoRA no point reaches the refusal floor of 90.0%: small comes nearest with 52.0%"
    )
    assert "(not distinguishable from without Safe LoRA)" in projection


@pytest.mark.parametrize(
    "refusal",
    [0.98, 0.92],
)
def test_a_point_that_meets_the_floor_is_a_candidate_however_high_its_interval_is(
    study: Study, refusal: float
) -> None:
    (_, projection) = short(
        study, [result(0, refusal=0.3), result(1, refusal=refusal, share=0.5, threshold=0.5)]
    )
    assert "meets the refusal floor of 90.0%, as a candidate: not confirmed" in projection


def test_the_cost_in_usefulness_is_reported_only_if_it_is_distinguishable(
    study: Study,
) -> None:
    rows = [
        result(0, refusal=0.3, task=0.8),
        result(1, refusal=0.98, task=0.4, share=0.5, threshold=0.5),
    ]
    assert (
        "at a task accuracy of 40.0% [33.5, 46.9], lower than the 80.0% [73.9, 85.0] without"
        in short(study, rows)[1]
    )
    rows[1] = result(1, refusal=0.98, task=0.78, share=0.5, threshold=0.5)
    assert "not distinguishable from the 80.0%" in short(study, rows)[1]


def test_unknown_effects_are_reported_as_unknown(study: Study) -> None:
    assert (
        short(study, [])
        == short(study, [failed(0)])
        == ["No point has finished, so there is no answer yet."]
    )
    plain, projected = result(0), result(1, share=0.5, threshold=0.5)
    assert short(study, [plain], {})[0].endswith("is not known, as no aligned model was measured.")
    assert short(study, [projected])[0].endswith(
        "is not known, as every finished point is defended."
    )
    assert (
        short(study, [plain])[1]
        == "No defended point has finished, so the effect of Safe LoRA is not known."
    )
    only_task = study.model_copy(
        update={"objectives": (TASK,), "suites": {"task": study.suites["task"]}}
    )
    assert short(only_task, [plain]) == [
        "This study measures no refusal rate, so it cannot say how refusals moved."
    ]


def test_of_many_sizes_the_first_and_the_last_are_reported(study: Study) -> None:
    sizes = ["1b", "3b", "7b", "13b", "70b"]
    rows = [
        result(
            2 * n + of,
            model,
            refusal=(0.3, 0.98)[of],
            share=0.5 if of else None,
            threshold=0.5 if of else None,
        )
        for n, model in enumerate(sizes)
        for of in (0, 1)
    ]
    fine_tuning, projection = short(study, rows, dict.fromkeys(sizes, ALIGNED["small"]))
    for sentence in (fine_tuning, projection):
        assert "1b" in sentence and "70b" in sentence and "13b" not in sentence
        assert "(the 3 sizes between are below)" in sentence


def test_the_trainings_of_all_sizes_are_reported_together_and_corrected_together(
    study: Study,
) -> None:
    """A loss with p = 0.03 counts alone, but not beside a training without a loss."""
    rows = [result(0, refusal=0.93), result(1, "medium", refusal=0.96)]
    aligned: Baselines = {
        "small": {REFUSAL: rate(REFUSAL, 0.96)},
        "medium": {REFUSAL: rate(REFUSAL, 0.96)},
    }
    held = Held()
    for name in ("small", "medium"):
        held.found[name, "refusal"] = {0: share(192)}
    held.found[0, "refusal"], held.found[1, "refusal"] = {0: share(186)}, {0: share(192)}

    def fine_tuning(of: list[Result]) -> str:
        return in_short(study, of, aligned, before_after(study, of, aligned, held), held)[0]

    assert fine_tuning(rows[:1]).startswith(
        "Fine-tuning without Safe LoRA lowered the refusal rate"
    )
    assert fine_tuning(rows).startswith(
        "Fine-tuning without Safe LoRA did not measurably lower the refusal rate in any "
        "of 2 trainings"
    )


def test_the_short_answer_counts_the_comparisons_of_the_answer(study: Study) -> None:
    """A loss with p = 0.03 counts alone, but not beside a projection that changed nothing: both
    texts correct it for that.
    """
    rows = [result(0, refusal=0.93), result(1, refusal=0.93, share=0.5, threshold=0.5)]
    same = share(186)
    held = Held(
        {
            ("small", "refusal"): {0: share(192)},
            (0, "refusal"): {0: same},
            (1, "refusal"): {0: same},
        }
    )
    lines = before_after(study, rows, ALIGNED, held)
    assert "the refusal rate is not distinguishable" in answer(study, rows, ALIGNED, held)[0]
    assert in_short(study, rows, ALIGNED, lines, held)[0].startswith(
        "Fine-tuning without Safe LoRA did not measurably lower the refusal rate"
    )


def test_a_point_that_holds_the_floor_without_projection_and_is_the_more_useful_is_reported(
    study: Study,
) -> None:
    rows = [
        result(0, refusal=0.95, task=0.8),
        result(1, refusal=0.98, task=0.4, share=0.5, threshold=0.5),
    ]
    projection = short(study, rows)[1]
    assert projection.endswith(
        "; without Safe LoRA a point meets the floor and is the one that `ebbline pick` "
        "names: small refuses 95.0% [91.0, 97.3]"
        " at a task accuracy of 80.0% [73.9, 85.0]."
    )
    rows[0] = result(0, refusal=0.95, task=0.3)
    assert "`ebbline pick`" not in short(study, rows)[1]
