"""The one rule for "holds": a search nominates, a confirmation decides, and the claim about an
adapter is never that about a setting.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbline.analysis.report.answer import answer
from ebbline.analysis.report.short_answer import in_short
from ebbline.analysis.report.verdict import shown_effects, verdict
from ebbline.analysis.results.before_after import before_after, trios
from ebbline.analysis.results.claims.between_seeds import setting_interval
from ebbline.analysis.results.picks.confirmed import lines_of_confirmed, with_confirmations
from ebbline.analysis.results.picks.floors import (
    Floor,
    Standing,
    adapter_standing,
    bound,
    confirmed_bound,
    fewest_prompts,
    pick,
    standing,
)
from ebbline.analysis.results.picks.picked import lines_of, missed_by
from ebbline.commands.confirming.confirm import nominated
from ebbline.sweeps.study.points import Confirmed, Point, Result
from ebbline.sweeps.study.study import Study
from ebbline.tasks.errors import StudyError
from ebbline.tasks.measuring.metrics import Metric, pooled
from tests.analysis.conftest import REFUSAL, TASK, rate, result

FLOOR = [Floor(REFUSAL, 0.9)]
CANDIDATE = result(1, refusal=0.97, task=0.6, share=0.5, threshold=0.5)


def confirmed(
    adapter: float = 0.97,
    setting: Sequence[float] = (0.97, 0.98, 0.96, 0.97, 0.97),
    among: int = 1,
    point: Result = CANDIDATE,
    n: int = 520,
) -> Result:
    """The point as confirmed: the value of the adapter of seed 0, and of each fresh seed."""
    found = pooled([Metric(REFUSAL, round(each * n), n) for each in setting])
    adapters = {0: {REFUSAL: rate(REFUSAL, adapter, n)}}
    seeds = tuple(range(101, 101 + len(setting)))
    return replace(
        point, confirmed=Confirmed("ebb.confirm", 0, among, adapters, {REFUSAL: found}, seeds)
    )


@given(value=st.floats(0.5, 0.999), among=st.integers(1, 20), up=st.booleans())
def test_the_fewest_prompts_are_those_whose_bound_just_meets_the_floor(
    value: float, among: int, up: bool
) -> None:
    floor = Floor(REFUSAL, value) if up else Floor("over_refusal.over_refusal_rate", 1 - value)
    needed = int(fewest_prompts(floor, among))
    enough, fewer = (
        floor.margin(bound(Metric(floor.metric, n if up else 0, n), among)) >= -1e-12
        for n in (needed, max(1, needed - 1))
    )
    assert enough and (needed == 1 or not fewer)


def test_a_floor_that_the_prompts_cannot_show_is_named() -> None:
    few = confirmed(1.0, (1.0,) * 5, n=20)
    adapter, setting = lines_of_confirmed(few, FLOOR)
    assert adapter.endswith("20 prompts cannot show it, even if none fails: 29 are needed")
    assert setting.endswith("even if none fails: 29 are needed")
    assert not any("cannot show" in line for line in lines_of_confirmed(confirmed(n=29), FLOOR))


def test_a_search_only_nominates() -> None:
    for claim in ("adapter", "setting"):
        assert standing(CANDIDATE, FLOOR, claim) == "candidate"
        assert standing(result(0, refusal=0.85), FLOOR, claim) == "missed"
    best = pick([CANDIDATE], FLOOR, TASK)
    assert best is not None and best.meets and not best.holds


@pytest.mark.parametrize(
    ("found", "adapter", "setting"),
    [
        (confirmed(), "holds", "holds"),
        (confirmed(adapter=0.905), "unsure", "holds"),
        (confirmed(adapter=0.8), "missed", "holds"),
        # The quickstart's own case: the adapter holds, its setting does not.
        (confirmed(setting=(0.967, 0.892, 0.567, 0.108, 0.292)), "holds", "missed"),
        (confirmed(setting=(0.99, 0.99, 0.82, 0.99, 0.95)), "holds", "unsure"),
    ],
)
def test_the_two_claims_are_decided_apart(
    found: Result, adapter: Standing, setting: Standing
) -> None:
    assert standing(found, FLOOR, "adapter") == adapter
    assert standing(found, FLOOR, "setting") == setting


def test_confirmed_bounds_are_corrected_for_the_points_that_were_confirmed() -> None:
    few, many = confirmed(), confirmed(among=20)
    for claim in ("adapter", "setting"):
        metrics = [
            each.confirmed.adapters[0] if claim == "adapter" else each.confirmed.setting
            for each in (few, many)
            if each.confirmed is not None
        ]
        bounds = [
            confirmed_bound(each, own[REFUSAL], claim)
            for each, own in zip((few, many), metrics, strict=True)
        ]
        assert bounds[1] < bounds[0]
    edge = confirmed(adapter=0.93)
    assert standing(edge, FLOOR, "adapter") == "holds"
    assert standing(confirmed(adapter=0.93, among=50), FLOOR, "adapter") == "unsure"
    with pytest.raises(StudyError, match="point 1 was not confirmed"):
        confirmed_bound(CANDIDATE, CANDIDATE.metrics[REFUSAL], "adapter")


def test_a_floor_whose_metric_was_not_confirmed_leaves_a_candidate() -> None:
    floors = [*FLOOR, Floor(TASK, 0.5)]
    assert standing(confirmed(), floors, "adapter") == "candidate"
    assert standing(confirmed(), [*FLOOR, Floor(TASK, 0.7)], "adapter") == "missed"


def test_a_confirmed_point_is_picked_before_a_more_useful_candidate() -> None:
    useful = result(2, refusal=0.97, task=0.9, share=0.5, threshold=0.7)
    best = pick([confirmed(), useful], FLOOR, TASK)
    assert best is not None and (best.result.number, best.standing) == (1, "holds")
    refuted = pick([confirmed(adapter=0.5), useful], FLOOR, TASK)
    assert refuted is not None and (refuted.result.number, refuted.standing) == (2, "candidate")
    none = pick([confirmed(adapter=0.5)], FLOOR, TASK)
    assert none is not None and none.standing == "missed"


def test_with_several_seeds_the_best_confirmed_adapter_counts() -> None:
    found = confirmed()
    assert found.confirmed is not None
    adapters = {0: {REFUSAL: rate(REFUSAL, 0.5)}, 1: {REFUSAL: rate(REFUSAL, 0.99)}}
    two = replace(found, confirmed=replace(found.confirmed, adapters=adapters))
    assert [adapter_standing(two, FLOOR, seed) for seed in (0, 1)] == ["missed", "holds"]
    assert standing(two, FLOOR, "adapter") == "holds"


def test_both_claims_about_an_adapter_from_outside_are_about_the_adapter(study: Study) -> None:
    """It was never trained again, so it has no confirmed setting."""
    outside = replace(
        CANDIDATE, point=Point.of("small", {"adapter": "hub", "apply.threshold": 0.5})
    )
    results = []
    for value, stands in ((0.99, "holds"), (0.91, "unsure"), (0.5, "missed")):
        found = confirmed(adapter=value, point=outside)
        assert found.confirmed is not None
        found = replace(found, confirmed=replace(found.confirmed, setting={}, seeds=()))
        assert {standing(found, FLOOR, claim) for claim in ("adapter", "setting")} == {stands}
        results.append(found)
    assert "Confirmed: the adapter holds the floor." in " ".join(answer(study, results[:1], {}))
    refuted = " ".join(answer(study, results[2:], {}))
    assert "Confirmed not to hold: the adapter's value is below the floor." in refuted
    assert not trios(study, results[2:])[0].meets


def test_fresh_seeds_are_told_from_the_studys_own(study: Study) -> None:
    own = study.model_copy(update={"seeds": (0, 1)})
    confirming = study.model_copy(update={"study": "ebb.confirm", "seeds": (0, 1, 7, 8, 9)})
    again = replace(
        CANDIDATE,
        number=0,
        metrics={REFUSAL: pooled([Metric(REFUSAL, count, 100) for count in (97, 96, 40, 50, 60)])},
    )
    found, other = with_confirmations([CANDIDATE, result(2)], own, confirming, [again])
    assert other.confirmed is None and found.confirmed is not None
    assert {seed: each[REFUSAL].value for seed, each in found.confirmed.adapters.items()} == (
        {0: pytest.approx(0.97), 1: pytest.approx(0.96)}
    )
    assert found.confirmed.seeds == (7, 8, 9) and found.confirmed.among == 1
    assert found.confirmed.setting[REFUSAL].value == pytest.approx(0.5)


def test_a_confirmation_of_other_adapters_is_left_out(study: Study) -> None:
    """A study that was removed and begun anew with other settings has points of equal values."""
    confirming = study.model_copy(update={"study": "ebb.confirm", "seeds": (0, 7, 8, 9)})
    name = "apply[seed=0]"
    metrics = {REFUSAL: pooled([Metric(REFUSAL, 97, 100)] * 4)}
    again = replace(CANDIDATE, number=0, metrics=metrics, keys={name: "a" * 64})
    for key, is_kept in (("a" * 64, True), ("b" * 64, False)):
        own = replace(CANDIDATE, keys={name: key})
        (found,) = with_confirmations([own], study, confirming, [again])
        assert (found.confirmed is not None) == is_kept


def test_the_point_that_pick_names_is_nominated(study: Study) -> None:
    """In a study with defences, `pick` prefers a simpler one within a margin."""
    results = [
        result(0, refusal=0.95, task=0.59),
        result(1, refusal=0.95, task=0.6, share=0.5, threshold=0.5),
    ]
    several = study.model_copy(update={"defences": {"safe_lora": {}}})
    assert [each.number for each in nominated(study, results, [])] == [1]
    assert [each.number for each in nominated(several, results, [])] == [0, 1]


def test_every_output_says_candidate_until_a_setting_is_confirmed(study: Study) -> None:
    plain = result(0, refusal=0.3, task=0.8, threshold=None)

    def words(point: Result) -> str:
        results = [plain, point]
        lines = before_after(study, results, {})
        return "\n".join(
            [
                *answer(study, results, {}),
                *in_short(study, results, {}, lines),
                verdict(study, results, lines),
                str(shown_effects(study, results, lines)),
            ]
        )

    before = words(CANDIDATE)
    assert "It is a candidate: the best of 1 different adapters" in before
    assert "as a candidate: not confirmed" in before and "it is not confirmed to hold" in before
    after = words(confirmed())
    assert "Confirmed: the setting holds the floor." in after and "confirmed to hold" in after
    assert "on other prompts and 5 fresh training seeds: refusal rate 97.0%" in after
    refuted = words(confirmed(setting=(0.967, 0.892, 0.567, 0.108, 0.292)))
    assert "the floor of 90.0% was reached in the search and confirmed not to hold" in refuted
    assert "no point is confirmed to reach the refusal floor of 90.0%: small refuses 56.5%" in (
        refuted
    )
    assert "confirmed, and in the search 97.0% [93.6, 98.6]" in refuted
    assert "n = 200) in the search." in refuted
    assert "was not reached" not in refuted and "comes nearest with" not in refuted
    assert "40.5 points below the 97.0% that chose it" in refuted
    assert "none of 1 defended points holds" in refuted
    assert not any(trio.holds for trio in trios(study, [plain, CANDIDATE]))


def test_both_claims_are_worded_with_their_bound_and_their_seeds() -> None:
    adapter, setting = lines_of_confirmed(
        confirmed(setting=(0.967, 0.892, 0.567, 0.108, 0.292), among=3), FLOOR
    )
    assert adapter.startswith("this adapter (seed 0) holds refusal rate at least 90.0%")
    assert "with 95% confidence, allowing for 3 points confirmed" in adapter
    assert setting.startswith("this setting does not hold refusal rate at least 90.0%")
    assert "1 of 5 seeds meet it by themselves" in setting


def test_a_nearest_point_that_only_its_confirmed_values_miss_has_a_reason(study: Study) -> None:
    refuted = pick([confirmed(adapter=0.5)], FLOOR, TASK)
    assert refuted is not None and not refuted.meets
    assert missed_by(refuted, None) == "confirmed not to hold refusal rate at least 90.0%"
    assert missed_by(refuted, 0.95) == "confirmed not to hold refusal rate at least 90.0%"
    both = pick([confirmed(adapter=0.5)], [*FLOOR, Floor(TASK, 0.7)], TASK)
    assert both is not None and missed_by(both, None) == (
        "short by 10.0 points of task accuracy at least 70.0%, "
        "confirmed not to hold refusal rate at least 90.0%"
    )
    missed = pick([result(0, refusal=0.85)], FLOOR, TASK)
    assert missed is not None and missed.refuted == ()
    assert missed_by(missed, None) == "short by 5.0 points of refusal rate at least 90.0%"


def test_only_without_fresh_seeds_is_the_result_with_another_seed_unknown(study: Study) -> None:
    def words(point: Result) -> str:
        found = pick([point], FLOOR, TASK)
        assert found is not None
        return "\n".join(lines_of(study, found))

    unknown = "one training seed: the result with another seed is unknown"
    assert unknown in words(CANDIDATE)
    assert unknown not in words(confirmed())


def test_the_confirmed_interval_covers_the_truth_where_the_chosen_one_does_not() -> None:
    """Of 20 settings with equal true rates the best is picked, and measured again."""
    rng, spread, n, truth = np.random.default_rng(0), 0.08, 200, 0.7

    def measured() -> Metric:
        rates = np.clip(truth + spread * rng.normal(size=5), 0, 1)
        return pooled([Metric(REFUSAL, int(each), n) for each in rng.binomial(n, rates)])

    chosen = covered = 0
    repetitions = 300
    for _ in range(repetitions):
        best, again = max((measured() for _ in range(20)), key=lambda m: m.value), measured()
        chosen += best.interval[0] <= truth <= best.interval[1]
        low, high = setting_interval(again)
        covered += low <= truth <= high
    assert chosen / repetitions < 0.6
    assert covered / repetitions > 0.92


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_setting_below_its_floor_is_seldom_confirmed_to_hold(seeds: int) -> None:
    """`make bench-calibration` has all cells. By prompts alone a third would be called so."""
    rng, truth = np.random.default_rng(seeds), 0.7
    floor, repetitions = Floor(REFUSAL, truth + 1e-6), 600
    held = sum(
        standing(confirmed(setting=rates), [floor], "setting") == "holds"
        for rates in np.clip(truth + 0.1 * rng.normal(size=(repetitions, seeds)), 0, 1)
    )
    assert held / repetitions <= 0.07
